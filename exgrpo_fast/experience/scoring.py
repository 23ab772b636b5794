"""Completions -> verdicts: token ids to text, and the columns that a reward gets beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.types import Completion, Question, Trajectory, Verdict
from exgrpo_fast.rewards import RewardPool, RewardSample, RubricScorer, ScoreFuture
from exgrpo_fast.rollout.engine import Observer
from exgrpo_fast.run.display import Advance, Screen

Decode = Callable[[Sequence[int]], str]
Scorer = RewardPool | RubricScorer


class Verifier:
    """Asks the rewards about responses; the row's own columns are handed on with them."""

    def __init__(
        self,
        rewards: Scorer | None,
        decode: Decode,
        screen: Screen,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        """Of several `processes` the first one judges, for all; the others have no rewards."""
        self.processes = processes
        self.rewards = rewards
        self.decode = decode
        self.screen = screen

    def verify(
        self, questions: Sequence[Question], responses: Sequence[Completion | Trajectory]
    ) -> list[Verdict]:
        """One verdict each."""
        samples = [self.sample(*pair) for pair in zip(questions, responses, strict=True)]
        with self.screen.phase("reward", len(samples)) as advance:
            return self.score_on_rank0(lambda: self.score(samples, advance))

    def score(self, samples: Sequence[RewardSample], advance: Advance) -> list[Verdict]:
        """In the first process alone."""
        assert self.rewards is not None
        return self.rewards.score(samples, advance)

    def score_on_rank0(self, judge: Callable[[], list[Verdict]]) -> list[Verdict]:
        """The verdicts that `judge` gives in the first process."""
        return self.processes.run_on_rank0(judge, pack=pack_verdicts, unpack=unpack_verdicts)

    def sample(
        self, question: Question, response: Completion | Trajectory, draft: str | None = None
    ) -> RewardSample:
        columns = {**question.columns, "truncated": response.truncated}
        if draft is not None:
            columns["draft"] = draft
        text = self.decode(response.token_ids.tolist())
        return RewardSample(question.prompt, text, question.answer, columns)


def pack_verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [asdict(verdict) for verdict in verdicts]


def unpack_verdicts(entries: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    return [
        Verdict(**{**entry, "checks": tuple((name, met) for name, met in entry["checks"])})
        for entry in entries
    ]


class StreamingScorer(Observer):
    """Has responses scored while others are still being generated.

    A judge is asked at the end: it wants all of them side by side.
    """

    def __init__(
        self,
        verifier: Verifier,
        questions: Sequence[Question],
        advance: Callable[[int], object] = lambda count: None,
        *,
        drafts: Sequence[str] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
        beside: Callable[[], object] = lambda: None,
    ) -> None:
        """`questions`: of each request of the generation, by its place; `drafts`: the texts that
        these revise. `meanwhile`: called once, when the generation is under way; `beside`: called
        again and again until it ends."""
        self.verifier = verifier
        self.questions = questions
        self.drafts = drafts
        self.advance = advance
        # The first of several processes generates while the others wait for it: what is work for
        # all of them comes after.
        self.meanwhile = meanwhile if verifier.processes.count == 1 else None
        self.beside = beside
        self.pool = verifier.rewards if isinstance(verifier.rewards, RewardPool) else None
        self.ticket: ScoreFuture | None = None
        self.places: list[int] = []  # of the samples handed in, in that order
        self.samples: list[RewardSample] = []

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        samples = [
            self.verifier.sample(
                self.questions[place], completion, self.drafts[place] if self.drafts else None
            )
            for place, completion in zip(places, completions, strict=True)
        ]
        self.places += places
        self.samples += samples
        if self.pool is not None:
            self.ticket = self.pool.submit(samples, append_to=self.ticket)
        self.advance(len(places))

    def on_poll(self) -> None:
        self.verifier.screen.heartbeat()
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        self.beside()
        if self.pool is not None and self.ticket is not None:
            self.pool.poll()

    def verdicts(self) -> list[Verdict]:
        """One for each request, in their order; waits for what is open."""
        return self.verifier.score_on_rank0(self._verdicts)

    def _verdicts(self) -> list[Verdict]:
        with self.verifier.screen.phase("reward", len(self.samples)) as advance:
            if self.pool is not None and self.ticket is not None:
                found = self.pool.verdicts(self.ticket, advance)
            else:
                found = self.verifier.score(self.samples, advance)
        by_place = dict(zip(self.places, found, strict=True))
        return [by_place[place] for place in range(len(self.questions))]
