"""May this checkpoint be the prior of that policy? Answered from small files, before any weights.

Token ids go from one model to the other, so both must mean the same by every id and end by the
same ids. Rows of a head beyond the tokenizer are padding, as many as a model likes: no id of the
prior's padding is ever drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import xxhash
from transformers import AutoConfig, GenerationConfig

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line
from exgrpo_fast.model.folder_reading import Tokenizer


class PriorError(UserError):
    """A checkpoint that cannot be the prior, in one line that names it and the policy."""


class Vocabulary(NamedTuple):
    """What a model folder says of its tokens."""

    folder: str
    fingerprint: str  # equal for tokenizers that give every token the same id
    num_tokens: int  # ids of the tokenizer
    num_rows: int  # of the head
    eos_token_ids: frozenset[int]


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    listed = sorted(vocabulary.items(), key=lambda entry: entry[1])
    return xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())


def read_vocabulary(folder: str, tokenizer: Tokenizer) -> Vocabulary:
    """From config.json, generation_config.json and the tokenizer."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PriorError(f"{folder}: no model: {first_line(error)}") from None
    try:
        generation = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # a model without one stops where its config says
        generation = GenerationConfig.from_model_config(config)
    listed = generation.eos_token_id
    others = listed if isinstance(listed, list) else [listed]
    ids = tokenizer.get_vocab()
    return Vocabulary(
        folder,
        fingerprint(ids),
        max(ids.values()) + 1,
        config.get_text_config().vocab_size,
        frozenset(e for e in (tokenizer.eos_token_id, *others) if e is not None),
    )


def refuse_other_vocabulary(policy: Vocabulary, prior: Vocabulary) -> None:
    """PriorError where a token id would not mean the same to both."""
    both = f"prior_resampling.model {prior.folder} cannot guide model.name {policy.folder}"
    if policy.fingerprint != prior.fingerprint:
        sizes = f"{prior.num_tokens} and {policy.num_tokens} tokens"
        raise PriorError(f"{both}: they have different tokenizers ({sizes})")
    for one in (policy, prior):
        if one.num_rows < one.num_tokens:
            raise PriorError(
                f"{both}: the head of {one.folder} has {one.num_rows} rows for {one.num_tokens} "
                f"tokens"
            )
    if policy.eos_token_ids != prior.eos_token_ids:
        ends = f"{sorted(prior.eos_token_ids)} and {sorted(policy.eos_token_ids)}"
        raise PriorError(f"{both}: they end completions by different tokens ({ends})")
