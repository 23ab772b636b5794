"""Drafting and scoring with transformers: a KV cache in which every row keeps its own prefix.

Completions of a batch accept different numbers of drafted tokens. Cropping the cache would crop all
rows alike; here nothing is cropped. What a row has thrown away stays in the cache as a hole that
the attention mask hides, and every forward gets the positions of its tokens and a 4-D mask. So one
forward serves all rows, however ragged.

A lane is used like a prefix cache: it is handed whole prefixes, finds what of them it has read, and
reads the rest.

Legend of shapes: B rows, n tokens fed in one forward, S slots of the cache, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from exgrpo_fast.experience.prior.mixture import completion_logprobs, known_ids, pad_logprobs
from exgrpo_fast.experience.prior.protocols import Draft, DraftScores, Drawn, EngineResult, Prefix
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, PolicyError, inference
from exgrpo_fast.model.renamed import cache_argument
from exgrpo_fast.rollout.hf.drawing import hash_uniform, invert_cdf, signed


class MaskedCache:
    """What a model has read of some sequences, each under the place of its completion."""

    def __init__(self, policy: Policy, places: Sequence[int]) -> None:
        self.policy = policy
        self.row_of = {place: row for row, place in enumerate(places)}
        self.read: list[list[int]] = [[] for _ in places]  # tokens that each row holds
        self.slots: list[list[int]] = [[] for _ in places]  # and where
        self.visible_BS = torch.zeros(len(places), 0, dtype=torch.bool)
        model: Any = policy.model
        self.cache: Any = DynamicCache(config=model.config)

    def go_to(self, sequences: dict[int, list[int]], counts: dict[int, int]) -> Tensor:
        """Each place to the end of its sequence -> logits [B, max count, V], aligned at the right.

        The last `count` positions of each sequence are wanted. Rows that are not named stand still.
        """
        missing: dict[int, list[int]] = {}
        for place, ids in sequences.items():
            row = self.row_of[place]
            known = min(_common(self.read[row], ids), len(ids) - counts[place])
            # What follows the known tokens of the row becomes holes.
            self.visible_BS[row, self.slots[row][known:]] = False
            del self.read[row][known:], self.slots[row][known:]
            missing[place] = ids[known:]
        return self.go_on(missing, keep=max(counts.values()))

    def select(self, places: Sequence[int]) -> None:
        """Keep only these rows."""
        rows = [self.row_of[place] for place in places]
        self.row_of = {place: row for row, place in enumerate(places)}
        self.read, self.slots = [self.read[r] for r in rows], [self.slots[r] for r in rows]
        self.visible_BS = self.visible_BS[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.policy.device))

    def go_on(self, fed: dict[int, list[int]], keep: int) -> Tensor:
        """place -> the tokens that follow what it has read -> logits [B, keep, V], the last ones."""
        device, width = self.policy.device, max(len(tokens) for tokens in fed.values())
        ids = torch.zeros(len(self.read), width, dtype=torch.int64)
        positions, valid = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        num_slots = self.visible_BS.shape[1]
        for place, tokens in fed.items():
            row = self.row_of[place]
            start, begin = len(self.read[row]), width - len(tokens)
            ids[row, begin:] = torch.tensor(tokens, dtype=torch.int64)
            positions[row, begin:] = torch.arange(start, start + len(tokens))
            valid[row, begin:] = True
            self.read[row] += tokens
            self.slots[row] += range(num_slots + begin, num_slots + width)
        self.visible_BS = torch.cat([self.visible_BS, valid], dim=1)
        total = num_slots + width
        causal_nS = torch.ones(width, total, dtype=torch.bool).tril(num_slots)
        # A hole sees itself, so that no row of the softmax is empty; nobody sees the hole.
        itself_nS = torch.eye(width, total, dtype=torch.bool).roll(num_slots, dims=1)
        mask_BnS = causal_nS & self.visible_BS[:, None] | itself_nS
        model: Any = self.policy.model
        return model(
            input_ids=known_ids(self.policy, ids.to(device)),
            position_ids=positions.to(device),
            attention_mask=mask_BnS[:, None].to(device),
            use_cache=True,
            logits_to_keep=keep,
            **{cache_argument(model): self.cache},
        ).logits


def _common(read: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the common beginning."""
    if read == ids[: len(read)]:
        return len(read)
    return next(i for i, token in enumerate(read) if i == len(ids) or token != ids[i])


class PrefixSession:
    """A model with a holed cache that follows the completions of one session."""

    def __init__(self, policy: Policy, *, num_tokens: int, vocabulary_size: int) -> None:
        """`num_tokens`: ids of the tokenizer, beyond which a row of the head is padding;
        `vocabulary_size`: width of the distributions that are handed out. PolicyError for a model
        with sliding attention, whose cache forgets by itself."""
        kinds = set(getattr(policy.model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise PolicyError(
                f"{policy.model.config.model_type}: prior_resampling needs full attention in every "
                f"layer, and this model has {', '.join(sorted(kinds))}"
            )
        self.policy = policy
        self.num_tokens = num_tokens
        self.vocabulary_size = vocabulary_size
        self.cache: MaskedCache | None = None

    def forget(self) -> None:
        self.cache = None

    def open(self, places: Sequence[int]) -> MaskedCache:
        """The session's cache, with a row for each place of its first call. Rows of finished
        completions leave once they are half of all: moving the others costs a copy."""
        if self.cache is None:
            self.cache = MaskedCache(self.policy, places)
        elif 2 * len(places) <= len(self.cache.row_of):
            self.cache.select(places)
        return self.cache

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        with torch.no_grad(), inference(self.policy.model), self.policy.autocast():
            yield

    def logprobs(self, logits: Tensor) -> Tensor:
        """[..., rows of the head] -> float32 [..., V]; padding has the log-probability -inf."""
        return pad_logprobs(logits, self.num_tokens, self.vocabulary_size)


class TransformersDrafter(PrefixSession):
    """Drafts with the trainer's own weights."""

    concurrent = False

    def __init__(
        self, policy: Policy, *, vocabulary_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        super().__init__(policy, num_tokens=vocabulary_size, vocabulary_size=vocabulary_size)
        self.eos_token_ids = frozenset(eos_token_ids)

    def draft(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        seeds: Sequence[int],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[Draft]]:
        cache = self.open([prefix.place for prefix in prefixes])
        tokens: list[list[int]] = [[] for _ in prefixes]
        found: list[list[Tensor]] = [[] for _ in prefixes]  # log-probs: scalars, or [V]
        going = list(range(len(prefixes)))  # drafts that are not finished
        with self.inference():
            sequences = dict(prefixes)
            logits_BnV = cache.go_to(sequences, dict.fromkeys(sequences, 1))
            for k in range(max(lengths)):
                rows = [cache.row_of[prefixes[i].place] for i in going]
                logprobs_AV = self.logprobs(logits_BnV[rows, -1])
                drawn_A, chosen_A = draw_tokens(logprobs_AV, [seeds[i] for i in going], k)
                kept = logprobs_AV if distributions else chosen_A
                for i, token, values in zip(going, drawn_A.tolist(), kept.cpu(), strict=True):
                    tokens[i].append(token)
                    found[i].append(values)
                going = [i for i in going if not self._finished(tokens[i], lengths[i])]
                if not going:
                    break
                logits_BnV = cache.go_on({prefixes[i].place: tokens[i][-1:] for i in going}, keep=1)
        drafts = []
        for ids, values in zip(tokens, found, strict=True):
            logprobs = torch.stack(values)
            if distributions:
                drafts.append(Draft(ids, _chosen(logprobs, ids), logprobs))
            else:
                drafts.append(Draft(ids, logprobs))
        return EngineResult(drafts)

    def _finished(self, tokens: Sequence[int], length: int) -> bool:
        return len(tokens) >= length or tokens[-1] in self.eos_token_ids


def _chosen(logprobs_mV: Tensor, tokens: Sequence[int]) -> Tensor:
    return logprobs_mV.gather(1, torch.tensor(tokens, device=logprobs_mV.device)[:, None])[:, 0]


def draw_tokens(logprobs_AV: Tensor, seeds: Sequence[int], position: int) -> tuple[Tensor, Tensor]:
    """(tokens [A], their log-probs [A])."""
    seeds_A = torch.tensor([signed(seed) for seed in seeds], device=logprobs_AV.device)
    drawn_A, _ = invert_cdf(logprobs_AV.exp(), hash_uniform(seeds_A, position))
    return drawn_A, logprobs_AV.gather(1, drawn_A[:, None])[:, 0]


class TransformersPrior(PrefixSession):
    """Scores drafts with a frozen model on the same device. A replacement is drawn from the logits
    that scored the draft it replaces: no forward of its own."""

    prefix_block: int | None = None
    scored: dict[int, Tensor]  # place -> logits [m, V] of the drafts of this round
    starts: dict[int, int]  # place -> length of their prefix

    def score(
        self,
        prefixes: Sequence[Prefix],
        drafts: Sequence[Sequence[int]],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[DraftScores]]:
        cache = self.open([prefix.place for prefix in prefixes])
        pairs = [(p.place, p.token_ids, draft) for p, draft in zip(prefixes, drafts, strict=True)]
        # The last draft is not read: nothing is predicted from it yet.
        sequences = {place: [*ids, *draft[:-1]] for place, ids, draft in pairs}
        with self.inference():
            logits_BnV = cache.go_to(sequences, {place: len(draft) for place, _, draft in pairs})
        self.starts = {place: len(ids) for place, ids, _ in pairs}
        self.scored, found = {}, []
        for place, _, draft in pairs:
            self.scored[place] = logits_BnV[cache.row_of[place], -len(draft) :]
            logprobs_mV = self.logprobs(self.scored[place])
            chosen = _chosen(logprobs_mV, draft).cpu()
            found.append(DraftScores(chosen, logprobs_mV.cpu() if distributions else None))
        return EngineResult(found)

    def draw(self, prefixes: Sequence[Prefix], seeds: Sequence[int]) -> EngineResult[list[Drawn]]:
        rows = [self.scored[p.place][len(p.token_ids) - self.starts[p.place]] for p in prefixes]
        drawn_A, chosen_A = draw_tokens(self.logprobs(torch.stack(rows)), seeds, 0)
        pairs = zip(drawn_A.tolist(), chosen_A.tolist(), strict=True)
        return EngineResult([Drawn(token, logprob) for token, logprob in pairs])

    def whole_completions(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]
    ) -> list[Tensor]:
        return completion_logprobs(
            self.policy, Ragged.of(prompts), Ragged.of(completions), num_tokens=self.num_tokens
        )

    def forget(self) -> None:
        super().forget()
        self.scored, self.starts = {}, {}
