"""Draft, score, resample: many completions of different lengths side by side, in rounds.

Of every completion that is not finished, a round

    drafts   up to K tokens with the policy (an end-of-sequence token ends the draft)
    scores   them with the prior, all in one pass
    cuts     before the first one that the trigger rejects; what follows it is dropped
    draws    the token of that position from the prior; it is accepted as it is

EAPO (arXiv 2606.30420), section 3.2 and algorithm 1. The law of what is emitted does not depend on
K (docs/eapo.md). Randomness is a hash of (seed of the request, round, purpose), so a completion
depends on its own seed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
import xxhash

from exgrpo_fast.core.types import Completion, Guidance
from exgrpo_fast.experience.prior.protocols import (
    Draft,
    Drafter,
    DraftScores,
    EngineResult,
    Prefix,
    PriorScorer,
    T,
)
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.rollout.engine import Request
from exgrpo_fast.rollout.hf.drawing import hash_uniform, signed

NO_TOKEN = -1


@dataclass
class GuidedCompletion:
    """A completion in the making; the lists have one entry for each emitted token."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    redrawn: list[bool] = field(default_factory=list)
    draft_logprobs: list[float] = field(default_factory=list)  # nan where redrawn
    prior_logprobs: list[float] = field(default_factory=list)
    tested: list[float] = field(default_factory=list)  # the statistic of the draft
    rejected: list[int] = field(default_factory=list)  # NO_TOKEN where the draft was kept
    rounds: int = 0
    drafted: int = 0
    ended: bool = False

    @property
    def prefix_ids(self) -> list[int]:
        return [*self.request.prompt_ids, *self.token_ids]

    def seed(self, purpose: str) -> int:
        """Of this round, a pure function of its place in the run."""
        text = f"{self.request.seed}/{self.rounds}/{purpose}"
        return xxhash.xxh3_64_intdigest(text.encode())

    def keep(
        self, draft: Draft, scores: DraftScores, statistic: Sequence[float], count: int
    ) -> None:
        """The first `count` tokens of a draft."""
        self.token_ids += draft.token_ids[:count]
        self.draft_logprobs += draft.logprobs[:count].tolist()
        self.prior_logprobs += scores.logprobs[:count].tolist()
        self.tested += statistic[:count]
        self.redrawn += [False] * count
        self.rejected += [NO_TOKEN] * count

    def replace(self, rejected: int, statistic: float, token_id: int, logprob: float) -> None:
        """The token of this position, from the prior."""
        self.token_ids.append(token_id)
        self.draft_logprobs.append(float("nan"))
        self.prior_logprobs.append(logprob)
        self.tested.append(statistic)
        self.redrawn.append(True)
        self.rejected.append(rejected)

    def completion(self) -> Completion:
        """`logprobs` are the policy's where it has kept its drafts, nan elsewhere."""
        return Completion(
            torch.tensor(self.token_ids), torch.tensor(self.draft_logprobs), not self.ended
        )

    def guidance(self) -> Guidance:
        return Guidance(
            redrawn=torch.tensor(self.redrawn),
            draft_logprobs=torch.tensor(self.draft_logprobs),
            prior_logprobs=torch.tensor(self.prior_logprobs),
            tested=torch.tensor(self.tested),
            rejected=torch.tensor(self.rejected),
        )


@dataclass(eq=False)
class Resampler:
    """One driver for every pair of engines; it holds no state between sessions."""

    drafter: Drafter
    scorer: PriorScorer
    trigger: Trigger
    _: KW_ONLY
    block_tokens: int  # K, drafted tokens a round at most
    max_completion_tokens: int
    eos_token_ids: Sequence[int]

    def start(self, requests: Sequence[Request]) -> Session:
        return Session(self, requests)


class Session:
    """The completions to some requests. `advance` never waits, `finish` does."""

    def __init__(self, resampler: Resampler, requests: Sequence[Request]) -> None:
        self.resampler = resampler
        self.completions = [GuidedCompletion(request) for request in requests]
        self.seconds = {"draft": 0.0, "score": 0.0, "draw": 0.0}
        self._rounds = self._run()

    def advance(self) -> bool:
        """As far as it goes without waiting for an engine; whether anything is left to do."""
        return next(self._rounds, None) is not None

    def finish(self) -> list[GuidedCompletion]:
        while self.advance():
            pass
        return self.completions

    def _run(self) -> Generator[bool, None, None]:
        """Yields True wherever somebody else may go on: after a round, or when a result is late."""
        while places := [i for i, r in enumerate(self.completions) if not self._finished(r)]:
            yield from self._round(places)
            yield True
        self.resampler.drafter.forget()
        self.resampler.scorer.forget()

    def _round(self, places: Sequence[int]) -> Generator[bool, None, None]:
        resampler, trigger = self.resampler, self.resampler.trigger
        prefixes = [Prefix(i, self.completions[i].prefix_ids) for i in places]
        drafts = yield from self._wait(
            "draft",
            lambda: resampler.drafter.draft(
                prefixes,
                [self._draft_length(self.completions[i]) for i in places],
                [self.completions[i].seed("draft") for i in places],
                distributions=trigger.of_state,
            ),
        )
        scores = yield from self._wait(
            "score",
            lambda: resampler.scorer.score(
                prefixes, [draft.token_ids for draft in drafts], distributions=trigger.of_state
            ),
        )
        cuts: list[tuple[Prefix, int, float]] = []  # behind what was kept; the rejected token
        for prefix, draft, scored in zip(prefixes, drafts, scores, strict=True):
            if (rejected := self._cut(prefix, draft, scored)) is not None:
                completion = self.completions[prefix.place]
                cuts.append((Prefix(prefix.place, completion.prefix_ids), *rejected))
        if cuts:
            behind = [prefix for prefix, _, _ in cuts]
            seeds = [self.completions[prefix.place].seed("draw") for prefix in behind]
            drawn = yield from self._wait("draw", lambda: resampler.scorer.draw(behind, seeds))
            for (prefix, token, statistic), found in zip(cuts, drawn, strict=True):
                self.completions[prefix.place].replace(token, statistic, *found)
        for i in places:
            self.completions[i].rounds += 1
            self.completions[i].ended = self.completions[i].token_ids[-1] in resampler.eos_token_ids

    def _cut(self, prefix: Prefix, draft: Draft, scores: DraftScores) -> tuple[int, float] | None:
        """Keeps the draft up to the first token that is rejected; that token and its statistic."""
        completion, trigger = self.completions[prefix.place], self.resampler.trigger
        if trigger.of_state:
            assert draft.distributions is not None and scores.distributions is not None
            statistic = trigger.statistic(draft.distributions, scores.distributions)[:, 0]
        else:
            statistic = trigger.statistic(draft.logprobs, scores.logprobs)
        keep = trigger.keep_probability(statistic)
        lot = torch.full_like(keep, 0.5)
        if trigger.draws_lots:
            seed = torch.tensor([signed(completion.seed("test"))])
            lot = torch.cat([hash_uniform(seed, k) for k in range(len(keep))])
        values, rejected = statistic.tolist(), (lot >= keep).nonzero()[:, 0].tolist()
        completion.drafted += len(values)
        if not rejected:
            completion.keep(draft, scores, values, len(values))
            return None
        first = rejected[0]
        completion.keep(draft, scores, values, first)
        return draft.token_ids[first], values[first]

    def _draft_length(self, completion: GuidedCompletion) -> int:
        """K, but no more than there is room for. Where the prior's prefix cache would end in a full
        block just behind the draft, one less: the cache would hide the row of its last token."""
        resampler = self.resampler
        room = resampler.max_completion_tokens - len(completion.token_ids)
        length, block = min(resampler.block_tokens, room), resampler.scorer.prefix_block
        if block and (len(completion.prefix_ids) + length) % block == 0:
            length = max(length - 1, 1)
        return length

    def _finished(self, completion: GuidedCompletion) -> bool:
        return completion.ended or len(completion.token_ids) >= self.resampler.max_completion_tokens

    def _wait(self, phase: str, ask: Callable[[], EngineResult[T]]) -> Generator[bool, None, T]:
        """The answer; yields while it is late. The seconds of the phase run until it is there."""
        start = time.perf_counter()
        pending = ask()
        while not pending.ready():
            yield True
        self.seconds[phase] += time.perf_counter() - start
        return pending.result()
