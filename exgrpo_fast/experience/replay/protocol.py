"""The interface of replay: `prepare` before a step, `finish` after its rewards; and its absence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from exgrpo_fast.core.types import Group, Question, Trajectory
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_kernels import PolicyObjective


@dataclass(frozen=True)
class ReplaySample:
    """The stored trajectories chosen for one step, and how many there were to choose from."""

    slots: tuple[tuple[Trajectory, ...], ...]  # for each question of the step, mostly none
    num_candidates: int = 0
    candidate_entropy: float | None = None  # mean over all candidates, where they were scored


@dataclass(frozen=True)
class StepPlan:
    """The questions of a step, and what replay adds to each.

    How many stored trajectories a question gets is known at once, so that the engine can begin.
    Which ones takes a forward pass under the weights of the step: `sample` chooses them when it is
    first asked for, beside the generation where the engine runs elsewhere.
    """

    step: int
    again: tuple[Question, ...]  # asked again by replay
    drawn: tuple[Question, ...]  # from the question stream
    num_fresh: tuple[int, ...]  # completions to generate for each question
    groups: tuple[Group, ...] = ()  # whole groups from the store
    choose: Callable[[], ReplaySample] | None = None
    # groups of the step -> the same, those without a gradient replaced by stored ones
    replace_groups: Callable[[Sequence[Group]], list[Group]] = list

    @property
    def questions(self) -> tuple[Question, ...]:
        return self.again + self.drawn

    @cached_property
    def sample(self) -> ReplaySample:
        return self.choose() if self.choose else ReplaySample(((),) * len(self.questions))

    def state_dict(self) -> dict[str, Any]:
        """The ids of its questions; their completions are generated again after a resume."""
        return {"planned": [q.id for q in self.again], "drawn": [q.id for q in self.drawn]}


class Finished(NamedTuple):
    objective: PolicyObjective  # the loss of this step's update
    metrics: dict[str, Any]
    groups: tuple[Group, ...] | None = None  # to train on; None: the step's own


class Replay(Protocol):
    """All that training calls of a replay source."""

    def prepare(self, step: int, begun: Mapping[str, Any] | None = None) -> StepPlan:
        """`begun`: the `StepPlan.state_dict` of a checkpoint, to ask the same questions."""
        ...

    def finish(
        self, plan: StepPlan, groups: Sequence[Group], objective: PolicyObjective
    ) -> Finished:
        """Once a step, after the rewards of all its `groups` and before the update of the policy.

        `objective`: the loss without replay. Solved questions leave the question stream.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class NoReplay:
    """The on-policy run: every question comes from the stream, every completion is fresh."""

    stream: QuestionStream
    prompts_per_step: int
    group_size: int

    def prepare(self, step: int, begun: Mapping[str, Any] | None = None) -> StepPlan:
        if begun is None:
            drawn = self.stream.draw(self.prompts_per_step)
        else:
            drawn = self.stream.find([*begun["planned"], *begun["drawn"]])
        return StepPlan(step, (), tuple(drawn), (self.group_size,) * len(drawn))

    def finish(
        self, plan: StepPlan, groups: Sequence[Group], objective: PolicyObjective
    ) -> Finished:
        return Finished(objective, {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
