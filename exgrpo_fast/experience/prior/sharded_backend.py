"""Drafts by the rollout engine and scores by a sharded prior: EAPO on several ranks.

All ranks run the same session. Rank 0's engine drafts and broadcasts; of the packs that the prior
scores each rank reads its share, and the results are summed over the ranks. So every rank has the
same drafts and scores, bit for bit, and decides alike. Nothing is cached between two rounds: each
reads its prefixes again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exgrpo_fast.experience.prior.hf_backend import draw_tokens
from exgrpo_fast.experience.prior.mixture import completion_logprobs, logprobs
from exgrpo_fast.experience.prior.protocols import Draft, DraftScores, Drawn, EngineResult, Prefix
from exgrpo_fast.model.packing import Pack, Ragged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, RolloutEngine, Sampling


class EngineDrafter:
    """The policy, in the engine that makes the fresh completions."""

    concurrent = False

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def draft(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        seeds: Sequence[int],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[Draft]]:
        assert not distributions, "an engine returns no whole distributions"
        requests = [
            Request(tuple(prefix.token_ids), seed, length)
            for prefix, length, seed in zip(prefixes, lengths, seeds, strict=True)
        ]
        completions = self.engine.generate(requests, Sampling(max(lengths)))
        return EngineResult([Draft(c.token_ids.tolist(), c.logprobs) for c in completions])

    def forget(self) -> None:
        """The engine keeps nothing of a session."""


class PackedPrior:
    """The frozen prior. The token that replaces a draft is drawn from the hidden state that scored
    it, by the rank that has read it."""

    prefix_block: int | None = None

    def __init__(self, prior: Policy, *, num_tokens: int, vocabulary_size: int) -> None:
        """`num_tokens`: ids of the tokenizer, beyond which a row of the head is padding;
        `vocabulary_size`: width of the distributions that are drawn from."""
        self.prior = prior
        self.num_tokens = num_tokens
        self.vocabulary_size = vocabulary_size
        self.read: dict[int, Tensor] = {}  # place -> hidden states [m, D], of this rank's packs
        self.starts: dict[int, int] = {}  # place -> length of the prefix

    def score(
        self,
        prefixes: Sequence[Prefix],
        drafts: Sequence[Sequence[int]],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[DraftScores]]:
        assert not distributions, "whole distributions are not summed over the ranks"
        self.forget()

        def keep(packed: Pack, hidden_ND: Tensor) -> None:
            parts = hidden_ND.split(packed.lengths)
            self.read |= {prefixes[i].place: h for i, h in zip(packed.index, parts, strict=True)}

        self.starts = {prefix.place: len(prefix.token_ids) for prefix in prefixes}
        found = completion_logprobs(
            self.prior,
            Ragged.of([prefix.token_ids for prefix in prefixes]),
            Ragged.of([torch.tensor(draft) for draft in drafts]),
            num_tokens=self.num_tokens,
            on_read=keep,
        )
        return EngineResult([DraftScores(logprobs_T) for logprobs_T in found])

    @torch.no_grad()
    def draw(self, prefixes: Sequence[Prefix], seeds: Sequence[int]) -> EngineResult[list[Drawn]]:
        found = torch.zeros(2, len(prefixes), dtype=torch.float64)  # tokens, their log-probs
        own = [i for i, prefix in enumerate(prefixes) if prefix.place in self.read]
        with self.prior.passes():
            if own:
                rows = [self._row(prefixes[i]) for i in own]
                of_head = {"num_tokens": self.num_tokens, "width": self.vocabulary_size}
                logprobs_AV = logprobs(self.prior, torch.stack(rows), **of_head)
                drawn = draw_tokens(logprobs_AV, [seeds[i] for i in own], 0)
                found[:, own] = torch.stack([values.double() for values in drawn]).cpu()
        self.prior.processes.all_reduce_sum_(found)
        pairs = zip(*found.tolist(), strict=True)
        return EngineResult([Drawn(int(token), logprob) for token, logprob in pairs])

    def _row(self, prefix: Prefix) -> Tensor:
        return self.read[prefix.place][len(prefix.token_ids) - self.starts[prefix.place]]

    def whole_completions(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]
    ) -> list[Tensor]:
        return completion_logprobs(
            self.prior, Ragged.of(prompts), Ragged.of(completions), num_tokens=self.num_tokens
        )

    def forget(self) -> None:
        self.read, self.starts = {}, {}
