"""May this checkpoint be the prior of that policy? Answered from small files, before any weights.
Loads no torch.

Token ids go from one model to the other, so both must mean the same by every id and end by the
same ids. Rows of a head beyond the tokenizer are padding, as many as a model likes: no id of the
prior's padding is ever drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import xxhash

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.folder_reading import ModelFiles, generation_settings


class PriorError(UserError):
    """A checkpoint that cannot be the prior, in one line that names it and the policy."""


class Vocabulary(NamedTuple):
    """What a model folder says of its tokens; None: only the class of the model knows it."""

    folder: str
    fingerprint: str  # equal for tokenizers that give every token the same id
    num_tokens: int  # ids of the tokenizer
    num_rows: int | None  # of the head
    eos_token_ids: frozenset[int] | None


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    listed = sorted(vocabulary.items(), key=lambda entry: entry[1])
    return xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())


def read_vocabulary(files: ModelFiles) -> Vocabulary:
    """From config.json, generation_config.json and the tokenizer."""
    text, ids = files.config.get_text_config(), files.tokenizer.get_vocab()
    generation, ends = generation_settings(files.name), None
    # A model without generation settings stops where its config says.
    if generation or hasattr(text, "eos_token_id"):
        listed = generation.get("eos_token_id") if generation else text.eos_token_id
        others = listed if isinstance(listed, list) else [listed]
        ends = frozenset(e for e in (files.tokenizer.eos_token_id, *others) if e is not None)
    return Vocabulary(
        files.name,
        fingerprint(ids),
        max(ids.values()) + 1,
        getattr(text, "vocab_size", None),
        ends,
    )


def refuse_other_vocabulary(policy: Vocabulary, prior: Vocabulary) -> None:
    """PriorError where a token id would not mean the same to both."""
    both = f"prior_resampling.model {prior.folder} cannot guide model.name {policy.folder}"
    if policy.fingerprint != prior.fingerprint:
        sizes = f"{prior.num_tokens} and {policy.num_tokens} tokens"
        raise PriorError(f"{both}: they have different tokenizers ({sizes})")
    for one in (policy, prior):
        if one.num_rows is not None and one.num_rows < one.num_tokens:
            raise PriorError(
                f"{both}: the head of {one.folder} has {one.num_rows} rows for {one.num_tokens} "
                f"tokens"
            )
    ours, theirs = policy.eos_token_ids, prior.eos_token_ids
    if ours is not None and theirs is not None and ours != theirs:
        ends = f"{sorted(theirs)} and {sorted(ours)}"
        raise PriorError(f"{both}: they end completions by different tokens ({ends})")
