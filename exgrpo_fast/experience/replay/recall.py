"""What the rooms above see of replay: a plan, a recall that is pending, and the source's protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from exgrpo_fast.core.types import Group, Question, Trajectory
from exgrpo_kernels import PolicyObjective


@dataclass(frozen=True)
class Plan:
    """What the store asks for in one step, before the stream fills the rest."""

    questions: tuple[Question, ...] = ()
    groups: tuple[Group, ...] = ()  # whole groups from the store


@dataclass(frozen=True)
class Recall:
    """What was recalled for one step, and what the choice looked like."""

    slots: tuple[tuple[Trajectory, ...], ...]  # for each question of the step, mostly none
    num_candidates: int = 0
    candidate_entropy: float | None = None  # mean over all candidates, where they were scored


class PendingRecall:
    """How many trajectories each question of a step will get, before it is known which.

    So the engine can begin: choosing needs a forward pass under the same weights, which goes on
    beside the generation where the engine runs elsewhere.
    """

    def __init__(self, counts: Sequence[int], choose: Callable[[], Recall] | None = None) -> None:
        self.counts = tuple(counts)
        self._choose = choose or (lambda: Recall(((),) * len(self.counts)))

    @cached_property
    def recall(self) -> Recall:
        """Chosen when it is first asked for."""
        return self._choose()

    @staticmethod
    def nothing(num_questions: int) -> PendingRecall:
        return PendingRecall((0,) * num_questions)


class Replay(Protocol):
    """What the rooms above need of a replay source."""

    def plan(self, *, step: int) -> Plan: ...
    def recall(self, plan: Plan, drawn: Sequence[Question], *, step: int) -> PendingRecall: ...
    def num_fresh(self, group_size: int, num_replayed: int) -> int: ...
    def exchange(self, groups: Sequence[Group]) -> list[Group]: ...
    def observe(self, groups: Sequence[Group], *, step: int) -> list[str]: ...
    def start_if_ready(self, pass_at_1: float) -> None: ...
    def objective(self, base: PolicyObjective) -> PolicyObjective: ...
    def metrics(self, replayed: Sequence[Trajectory], recall: Recall, *, step: int) -> dict: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoReplay:
    """The on-policy run: nothing is recalled, kept or retired."""

    active = False

    def plan(self, *, step: int) -> Plan:
        return Plan()

    def recall(self, plan: Plan, drawn: Sequence[Question], *, step: int) -> PendingRecall:
        return PendingRecall.nothing(len(drawn))

    def num_fresh(self, group_size: int, num_replayed: int) -> int:
        return group_size

    def exchange(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    def observe(self, groups: Sequence[Group], *, step: int) -> list[str]:
        return []

    def start_if_ready(self, pass_at_1: float) -> None:
        pass

    def objective(self, base: PolicyObjective) -> PolicyObjective:
        return base

    def metrics(
        self, replayed: Sequence[Trajectory], recall: Recall, *, step: int
    ) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
