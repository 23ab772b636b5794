"""Completions -> verdicts: token ids to text, and the columns that a reward gets beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol, runtime_checkable

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.types import Completion, Question, RewardSample, Trajectory, Verdict
from exgrpo_fast.rollout.engine import Observer
from exgrpo_fast.run.display import Screen


class Scorer(Protocol):
    """What gives verdicts: a reward pool, or a pool with a judge behind it."""

    def score(
        self, samples: Sequence[RewardSample], on_finished: Callable[[int], object]
    ) -> list[Verdict]: ...

    def check(self, *samples: RewardSample) -> None:
        """RewardError or JudgeError, in one line, where a reward fails on every sample."""
        ...

    def refuse_faults(self, verdicts: Sequence[Verdict]) -> None:
        """RewardError where nearly all verdicts are errors of the reward itself."""
        ...


@runtime_checkable
class StreamingPool(Scorer, Protocol):
    """A scorer that works while completions are still being generated."""

    def submit(self, samples: Sequence[RewardSample], *, append_to: Any = None) -> Any: ...
    def poll(self) -> None: ...
    def verdicts(self, future: Any, on_finished: Callable[[int], object]) -> list[Verdict]: ...


@dataclass(eq=False)
class Verifier:
    """Asks the rewards about completions; the row's own columns are handed on with them."""

    rewards: Scorer | None  # None on all ranks but 0, which scores for all of them
    decode: Callable[[Sequence[int]], str]
    screen: Screen
    processes: Processes = SINGLE_PROCESS

    def sample(
        self, question: Question, completion: Completion | Trajectory, draft: str | None = None
    ) -> RewardSample:
        columns = {**question.columns, "truncated": completion.truncated}
        if draft is not None:
            columns["draft"] = draft
        text = self.decode(completion.token_ids.tolist())
        return RewardSample(question.prompt, text, question.answer, columns)


def unpack_verdicts(entries: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    return [
        Verdict(**{**entry, "checks": tuple((name, met) for name, met in entry["checks"])})
        for entry in entries
    ]


@dataclass(eq=False)
class StreamingScorer(Observer):
    """Has completions scored while others are still being generated.

    A judge, and a reward of whole groups, get all of them together at the end. `questions`: of each
    request of the generation, by its place; `drafts`: the texts that these revise. `meanwhile`:
    called once, when the generation is under way; `beside`: again and again until it ends.
    """

    verifier: Verifier
    questions: Sequence[Question]
    advance: Callable[[int], object] = lambda count: None
    _: KW_ONLY
    drafts: Sequence[str] | None = None
    meanwhile: Callable[[], object] | None = None
    beside: Callable[[], object] = lambda: None
    future: Any = field(default=None, init=False)  # the pool's, with the verdicts so far
    places: list[int] = field(default_factory=list, init=False)  # of the samples, as handed in
    samples: list[RewardSample] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        # Beside other ranks only rank 0 generates; `meanwhile` may use collectives, which the
        # others would not join. The caller runs it afterwards.
        if self.verifier.processes.count > 1:
            self.meanwhile = None
        rewards = self.verifier.rewards
        self.pool = rewards if isinstance(rewards, StreamingPool) else None

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
            self.future = self.pool.submit(samples, append_to=self.future)
        self.advance(len(places))
        HEARTBEAT.beat()

    def on_poll(self) -> None:
        HEARTBEAT.beat()
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        self.beside()
        if self.pool is not None and self.future is not None:
            self.pool.poll()

    def verdicts(self, others: Sequence[Trajectory] = ()) -> list[Verdict]:
        """One for each request, in their order, then one for each of `others`; waits for all.

        `others`: further members of the same groups. RewardError where nearly all verdicts are
        errors of the reward itself.
        """
        return self.verifier.processes.run_on_rank0(
            lambda: self._verdicts(others),
            pack=lambda found: [verdict._asdict() for verdict in found],
            unpack=unpack_verdicts,
        )

    def _verdicts(self, others: Sequence[Trajectory]) -> list[Verdict]:
        samples = [self.verifier.sample(other.question, other) for other in others]
        rewards = self.verifier.rewards
        assert rewards is not None
        phase = self.verifier.screen.phase("reward", len(self.samples) + len(samples))
        with HEARTBEAT.phase("reward"), phase as advance:
            if self.pool is not None:
                self.future = self.pool.submit(samples, append_to=self.future)
                found = self.pool.verdicts(self.future, advance)
            else:
                found = rewards.score([*self.samples, *samples], advance)
        rewards.refuse_faults(found)
        by_place = dict(zip(self.places, found, strict=False))
        in_order = [by_place[place] for place in range(len(self.questions))]
        return in_order + found[len(in_order) :]
