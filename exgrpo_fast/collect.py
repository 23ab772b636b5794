"""One step's groups: plan -> sources -> rewards -> groups.

The plan of a step is a list of questions with open slots: a recalled question brings its replayed
trajectory and K - 1 fresh slots, any other question K fresh slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from exgrpo_fast.display import Screen
from exgrpo_fast.experience import Completion, Group, Question, Trajectory, Verdict
from exgrpo_fast.rewards import RewardPool, RewardSample
from exgrpo_fast.sources.fresh import FreshSource, Mismatch
from exgrpo_fast.sources.questions import QuestionStream
from exgrpo_fast.sources.replay import NoReplay, Recall, ReplaySource

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class OverlongRule:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to L - soft, then down to -1 at L."""

    max_completion_tokens: int
    soft_penalty_tokens: int = 0

    def penalty(self, num_tokens: int) -> float:
        over = num_tokens - (self.max_completion_tokens - self.soft_penalty_tokens)
        if over <= 0 or not self.soft_penalty_tokens:  # a replayed one may be above today's limit
            return 0.0
        return max(-1.0, -over / self.soft_penalty_tokens)


@dataclass
class Clock:
    """Seconds per phase of one step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Batch:
    """The groups to train on, and what it took to make them."""

    groups: tuple[Group, ...]
    discarded: tuple[Group, ...]  # generated, then left out by dynamic sampling
    recall: Recall
    mismatch: Mismatch

    @property
    def generated(self) -> tuple[Group, ...]:
        return self.groups + self.discarded


class Collector:
    """Fills the slots of a step from its sources and has every trajectory verified."""

    def __init__(
        self,
        *,
        stream: QuestionStream,
        fresh: FreshSource,
        replay: ReplaySource | NoReplay,
        rewards: RewardPool,
        decode: Decode,
        screen: Screen,
        overlong: OverlongRule,
        prompts_per_step: int,
        group_size: int,
        max_extra_batches: int | None = None,
    ) -> None:
        """`max_extra_batches`: dynamic sampling's refill rounds; None = no dynamic sampling."""
        self.stream = stream
        self.fresh = fresh
        self.replay = replay
        self.rewards = rewards
        self.decode = decode
        self.screen = screen
        self.overlong = overlong
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.max_extra_batches = max_extra_batches

    def collect(self, step: int, clock: Clock) -> Batch:
        with clock.measure("replay"):
            recall = self.replay.recall(self.stream.by_id, step=step)
        recalled = {trajectory.question.id for trajectory in recall.trajectories}
        drawn = self.stream.draw(self.prompts_per_step - len(recalled), exclude=recalled)
        groups, mismatch = self._make_groups(recall.trajectories, drawn, step, clock)
        if self.max_extra_batches is None:
            return Batch(tuple(groups), (), recall, mismatch)
        return self._refill(groups, recall, mismatch, step, clock)

    def _refill(
        self, groups: list[Group], recall: Recall, mismatch: Mismatch, step: int, clock: Clock
    ) -> Batch:
        """DAPO's dynamic sampling: groups without a gradient make room for new questions."""
        kept = [group for group in groups if group.learnable]
        discarded = [group for group in groups if not group.learnable]
        for _ in range(self.max_extra_batches or 0):
            missing = self.prompts_per_step - len(kept)
            if missing == 0:
                break
            seen = {group.question.id for group in kept + discarded}
            extra, _ = self._make_groups((), self.stream.draw(missing, exclude=seen), step, clock)
            kept += [group for group in extra if group.learnable]
            discarded += [group for group in extra if not group.learnable]
        return Batch(tuple(kept), tuple(discarded), recall, mismatch)

    def _make_groups(
        self,
        replayed: Sequence[Trajectory],
        drawn: Sequence[Question],
        step: int,
        clock: Clock,
    ) -> tuple[list[Group], Mismatch]:
        questions = [trajectory.question for trajectory in replayed] + list(drawn)
        slots = [self.group_size - 1] * len(replayed) + [self.group_size] * len(drawn)
        with clock.measure("rollout"), self.screen.phase("rollout", sum(slots)) as advance:
            completions = self.fresh.sample(questions, slots, step=step, on_finished=advance)
        flat = [c for of_question in completions for c in of_question]
        question_of = [q for q, n in zip(questions, slots, strict=True) for _ in range(n)]
        with clock.measure("reward"):
            verdicts = self._verify(
                [*question_of, *(t.question for t in replayed)], [*flat, *replayed]
            )
        with clock.measure("score"), self.screen.phase("score"):
            fresh, mismatch = self.fresh.score(question_of, flat, step=step)
        judged = [
            replace(
                trajectory,
                verdict=verdict,
                penalty=self.overlong.penalty(len(trajectory.token_ids)),
            )
            for trajectory, verdict in zip([*fresh, *replayed], verdicts, strict=True)
        ]
        return self._group(questions, slots, judged[: len(fresh)], judged[len(fresh) :]), mismatch

    def _verify(
        self, questions: Sequence[Question], responses: Sequence[Completion | Trajectory]
    ) -> list[Verdict]:
        samples = [
            RewardSample(q.prompt, self.decode(r.token_ids.tolist()), q.answer, q.columns)
            for q, r in zip(questions, responses, strict=True)
        ]
        with self.screen.phase("reward", len(samples)) as advance:
            return self.rewards.score(samples, advance)

    def _group(
        self,
        questions: Sequence[Question],
        slots: Sequence[int],
        fresh: Sequence[Trajectory],
        replayed: Sequence[Trajectory],
    ) -> list[Group]:
        """The replayed trajectory takes slot 0 of its group."""
        remaining, groups = iter(fresh), []
        for i, (question, count) in enumerate(zip(questions, slots, strict=True)):
            members = [next(remaining) for _ in range(count)]
            groups.append(Group(question, (*replayed[i : i + 1], *members)))
        return groups
