"""One step's groups: plan -> sources -> rewards -> groups -> advantages.

The plan of a step is a list of questions with open slots: those that the store asks again come
first, the stream brings the others. A question's replayed trajectories take its first slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.types import Completion, Group, Question, Trajectory, Verdict
from exgrpo_fast.experience.fresh import FreshSource
from exgrpo_fast.experience.hindsight.source import HindsightReport, HindsightSource
from exgrpo_fast.experience.prior.guidance_metrics import GuidanceCost
from exgrpo_fast.experience.prior.protocols import Prior
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.replay.protocol import Replay, StepPlan
from exgrpo_fast.experience.scoring import StreamingScorer, Verifier
from exgrpo_fast.rollout.engine import Generation
from exgrpo_fast.rollout.mismatch import Mismatch
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.advantages import AdvantageRule


class NothingScored(UserError):
    """No completion of a step got a verdict, in one line."""


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
class PhaseTimer:
    """Seconds per phase of one step; a phase inside another one is not counted in both."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)  # seconds of the phases inside each open one

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            with HEARTBEAT.phase(phase):
                yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner.pop()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed


@dataclass(frozen=True)
class Batch:
    """The groups to train on, and what it took to make them."""

    groups: tuple[Group, ...]
    discarded: tuple[Group, ...]  # generated, then left out by dynamic sampling
    plan: StepPlan
    mismatch: Mismatch
    hindsight: HindsightReport | None = None
    guidance: GuidanceCost = GuidanceCost()
    num_unscored: int = 0  # completions without a verdict, left out of their groups

    @property
    def generated(self) -> tuple[Group, ...]:
        return self.groups + self.discarded


class PendingBatch(NamedTuple):
    """A step's first completions, on their way."""

    plan: StepPlan
    num_fresh: list[int]  # completions of each question that the policy draws by itself
    num_guided: Sequence[int]  # and those that the prior guides
    generation: Generation


class BuiltGroups(NamedTuple):
    groups: list[Group]
    mismatch: Mismatch
    guidance: GuidanceCost
    num_unscored: int


@dataclass(eq=False, kw_only=True)
class Collector:
    """Fills the slots of a step from its sources and has every trajectory verified."""

    stream: QuestionStream
    fresh: FreshSource
    replay: Replay
    verifier: Verifier
    prior: Prior
    hindsight: HindsightSource | None = None
    screen: Screen
    advantages: AdvantageRule
    overlong: OverlongRule
    prompts_per_step: int
    group_size: int
    max_extra_batches: int | None = None  # rounds of dynamic sampling; None = no dynamic sampling
    begun: PendingBatch | None = field(default=None, init=False)  # by `begin`, until collected

    def begin(self, step: int, clock: PhaseTimer) -> None:
        """Plan a step and have the engine generate for it, while the one before is trained on."""
        with clock.measure("replay"):
            plan = self.replay.prepare(step)
        self.begun = self._request(plan)

    def _request(self, plan: StepPlan) -> PendingBatch:
        num_guided = self.prior.counts(len(plan.questions), step=plan.step)
        num_fresh = [n - guided for n, guided in zip(plan.num_fresh, num_guided, strict=True)]
        generation = self.fresh.start(plan.questions, num_fresh, step=plan.step)
        return PendingBatch(plan, num_fresh, num_guided, generation)

    def collect(
        self, step: int, clock: PhaseTimer, on_poll: Callable[[], None] = lambda: None
    ) -> Batch:
        """`on_poll` is called while the first completions are generated, and may raise: the step
        stays begun. (Whole groups from the store are in no checkpoint; they are not given up.)"""
        if self.begun is None:
            self.begin(step, clock)
        begun = self.begun
        assert begun is not None and begun.plan.step == step, "begun for another step"
        plan = begun.plan
        made = self._make_groups(begun, clock, (lambda: None) if plan.groups else on_poll)
        self.begun = None
        with clock.measure("replay"):
            groups = plan.replace_groups([*plan.groups, *made.groups])
        if not groups:
            raise NothingScored(
                f"step {step}: none of {made.num_unscored} completions got a verdict; is the judge "
                f"reachable? The newest checkpoint can be resumed"
            )
        batch = Batch(
            tuple(groups),
            (),
            plan,
            made.mismatch,
            guidance=made.guidance,
            num_unscored=made.num_unscored,
        )
        if self.max_extra_batches is not None:
            batch = self._refill(batch, step, clock)
        if self.hindsight is not None:
            with clock.measure("hindsight"), self.screen.phase("hindsight"):
                groups, report = self.hindsight.revise(batch.groups, step=step)
            batch = replace(batch, groups=tuple(groups), hindsight=report)
        return replace(
            batch,
            groups=tuple(map(self.advantages.apply, batch.groups)),
            discarded=tuple(map(self.advantages.apply, batch.discarded)),
        )

    def _refill(self, batch: Batch, step: int, clock: PhaseTimer) -> Batch:
        """DAPO's dynamic sampling: groups without a gradient make room for new questions."""
        kept = [group for group in batch.groups if group.learnable]
        discarded = [group for group in batch.groups if not group.learnable]
        guidance = batch.guidance
        for _ in range(self.max_extra_batches or 0):
            missing = self.prompts_per_step - len(kept)
            if missing == 0:
                break
            seen = {group.question.id for group in kept + discarded}
            drawn = self.stream.draw(missing, exclude=seen)
            plan = StepPlan(step, (), tuple(drawn), (self.group_size,) * len(drawn))
            extra = self._make_groups(self._request(plan), clock)
            kept += [group for group in extra.groups if group.learnable]
            discarded += [group for group in extra.groups if not group.learnable]
            guidance += extra.guidance
        return replace(batch, groups=tuple(kept), discarded=tuple(discarded), guidance=guidance)

    def _make_groups(
        self, begun: PendingBatch, clock: PhaseTimer, on_poll: Callable[[], None] = lambda: None
    ) -> BuiltGroups:
        """One group for each question: what replay sampled, then fresh ones, then guided ones."""
        questions, step = begun.plan.questions, begun.plan.step
        question_of = [q for q, n in zip(questions, begun.num_fresh, strict=True) for _ in range(n)]
        guided = self.prior.begin(questions, begun.num_guided, step=step)
        completions, grading = self._wait(begun, question_of, guided, clock, on_poll)
        sample = begun.plan.sample
        with clock.measure("score"), self.screen.phase("score"):
            fresh, mismatch = self.fresh.score(
                question_of, completions, step=step, observer=grading
            )
        with clock.measure("prior"), self.screen.phase("prior"):
            guided_ones, fresh, cost = self.prior.score(guided, fresh, step=step)
        others = [*(t for found in sample.slots for t in found), *guided_ones]
        with clock.measure("reward"):  # what is still open
            verdicts = grading.verdicts(others)
        pairs = zip([*fresh, *others], verdicts, strict=True)
        following = iter([self._with_verdict(*pair) for pair in pairs])
        own = [[next(following) for _ in range(n)] for n in begun.num_fresh]
        first = [[next(following) for _ in found] for found in sample.slots]
        last = [[next(following) for _ in range(n)] for n in begun.num_guided]
        groups = [
            Group(question, tuple(chain(*members)))
            for question, *members in zip(questions, first, own, last, strict=True)
        ]
        scored = [part for group in groups if (part := scored_part(group))]
        num_scored = sum(len(group.trajectories) for group in scored)
        return BuiltGroups(scored, mismatch, cost, len(verdicts) - num_scored)

    def _wait(
        self,
        begun: PendingBatch,
        question_of: Sequence[Question],
        guided: Any,
        clock: PhaseTimer,
        on_poll: Callable[[], None],
    ) -> tuple[list[Completion], StreamingScorer]:
        """The fresh completions; beside them, what can be done while they are generated."""

        def sample_now() -> None:
            with clock.measure("replay"):
                begun.plan.sample  # noqa: B018, chosen when it is first asked for

        def guide() -> None:
            on_poll()
            with clock.measure("prior"):
                guided.advance()

        with (
            clock.measure("rollout"),
            self.screen.phase("rollout", sum(begun.num_fresh)) as advance,
        ):
            beside = guide if self.prior.concurrent else on_poll
            grading = StreamingScorer(
                self.verifier, question_of, advance, meanwhile=sample_now, beside=beside
            )
            completions = begun.generation.wait(grading)
        sample_now()
        return completions, grading

    def _with_verdict(self, trajectory: Trajectory, verdict: Verdict) -> Trajectory:
        penalty = self.overlong.penalty(trajectory.num_tokens)
        return self.prior.mask_failed(replace(trajectory, verdict=verdict, penalty=penalty))

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        """What was begun is generated again after a resume, for the same questions."""
        return self.begun.plan.state_dict() if self.begun else {}

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """`step`: the next one."""
        if state:
            self.begun = self._request(self.replay.prepare(step, begun=state))


def scored_part(group: Group) -> Group | None:
    """The group without its unscored trajectories; None when none is left."""
    kept = tuple(t for t in group.trajectories if t.verdict is not None and t.verdict.scored)
    return Group(group.question, kept) if kept else None
