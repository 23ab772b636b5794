"""The interface of replay: a plan, a pending sample, and the protocol of a replay source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from exgrpo_fast.core.types import Group, Question, Trajectory
from exgrpo_kernels import PolicyObjective


@dataclass(frozen=True)
class Plan:
    """What the store asks for in one step, before the stream fills the rest."""

    questions: tuple[Question, ...] = ()
    groups: tuple[Group, ...] = ()  # whole groups from the store


@dataclass(frozen=True)
class ReplaySample:
    """What was recalled for one step, and what the choice looked like."""

    slots: tuple[tuple[Trajectory, ...], ...]  # for each question of the step, mostly none
    num_candidates: int = 0
    candidate_entropy: float | None = None  # mean over all candidates, where they were scored


class PendingSample:
    """How many trajectories each question of a step will get, before it is known which.

    So the engine can begin: choosing needs a forward pass under the same weights, which goes on
    beside the generation where the engine runs elsewhere.
    """

    def __init__(
        self, counts: Sequence[int], choose: Callable[[], ReplaySample] | None = None
    ) -> None:
        self.counts = tuple(counts)
        self._choose = choose or (lambda: ReplaySample(((),) * len(self.counts)))

    @cached_property
    def sample(self) -> ReplaySample:
        """Chosen when it is first asked for."""
        return self._choose()

    @staticmethod
    def nothing(num_questions: int) -> PendingSample:
        return PendingSample((0,) * num_questions)


class Finished(NamedTuple):
    """What replay made of a step's groups."""

    retired: list[str]  # ids of questions that the stream drops
    objective: PolicyObjective  # the loss of this step's update
    metrics: dict[str, Any]


class Replay(Protocol):
    """The methods of a replay source that training calls: the collector all but `finish`."""

    def plan(self, *, step: int) -> Plan: ...
    def sample(self, plan: Plan, drawn: Sequence[Question], *, step: int) -> PendingSample: ...
    def num_fresh(self, group_size: int, num_replayed: int) -> int: ...
    def replace_groups(self, groups: Sequence[Group]) -> list[Group]: ...
    def finish(
        self,
        groups: Sequence[Group],
        sample: ReplaySample,
        objective: PolicyObjective,
        *,
        pass_at_1: float,
        step: int,
    ) -> Finished: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoReplay:
    """The on-policy run: nothing is recalled, kept or retired."""

    active = False

    def plan(self, *, step: int) -> Plan:
        return Plan()

    def sample(self, plan: Plan, drawn: Sequence[Question], *, step: int) -> PendingSample:
        return PendingSample.nothing(len(drawn))

    def num_fresh(self, group_size: int, num_replayed: int) -> int:
        return group_size

    def replace_groups(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    def finish(
        self,
        groups: Sequence[Group],
        sample: ReplaySample,
        objective: PolicyObjective,
        *,
        pass_at_1: float,
        step: int,
    ) -> Finished:
        return Finished([], objective, {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
