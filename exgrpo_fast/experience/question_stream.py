"""The stream of fresh questions: shuffled epochs without the retired ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from exgrpo_fast.core.types import Question


class QuestionStream:
    """Draws questions in shuffled epochs; the order is a function of the seed and the epoch."""

    def __init__(self, questions: Sequence[Question], *, seed: int, min_live: int = 0) -> None:
        """`min_live`: so many questions stay in the stream however many retire."""
        if not questions:
            raise ValueError("there are no questions to train on")
        self.by_id = {question.id: question for question in questions}
        self.seed = seed
        self.min_live = min_live
        self._retired: dict[str, None] = {}
        self._epoch = -1
        self._waiting: list[str] = []

    @property
    def num_live(self) -> int:
        return len(self.by_id) - len(self._retired)

    def draw(self, count: int, *, exclude: AbstractSet[str] = frozenset()) -> list[Question]:
        """`count` distinct questions outside `exclude`; fewer only when there are not so many."""
        drawn: dict[str, None] = {}
        held_back: dict[str, None] = {}
        available = self.num_live - sum(q in self.by_id and q not in self._retired for q in exclude)
        while len(drawn) < min(count, available):
            if not self._waiting:
                self._start_epoch()
            question_id = self._waiting.pop()
            if question_id in self._retired:
                continue
            if question_id in exclude or question_id in drawn:
                held_back[question_id] = None
            else:
                drawn[question_id] = None
        # excluded today, first in line tomorrow, and not once more where an epoch began in between
        self._waiting = [q for q in self._waiting if q not in held_back] + [*reversed(held_back)]
        return [self.by_id[question_id] for question_id in drawn]

    def retire(self, question_ids: Iterable[str]) -> None:
        """Take solved questions out for good, down to `min_live`."""
        for question_id in question_ids:
            if self.num_live > self.min_live:
                self._retired[question_id] = None

    def find(self, question_ids: Sequence[str]) -> list[Question]:
        """ValueError where the data no longer has one of them."""
        refuse_unknown(set(question_ids), self.by_id.keys())
        return [self.by_id[question_id] for question_id in question_ids]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "waiting": self._waiting, "retired": list(self._retired)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        refuse_unknown({*state["waiting"], *state["retired"]}, self.by_id.keys())
        self._epoch = state["epoch"]
        self._waiting = list(state["waiting"])
        self._retired = dict.fromkeys(state["retired"])

    def _start_epoch(self) -> None:
        self._epoch += 1
        live = [question_id for question_id in self.by_id if question_id not in self._retired]
        np.random.default_rng([self.seed, self._epoch]).shuffle(live)
        self._waiting = live


def refuse_unknown(question_ids: AbstractSet[str], known: AbstractSet[str]) -> None:
    """ValueError when a checkpoint holds questions that the data does not."""
    if unknown := question_ids - known:
        raise ValueError(
            f"the checkpoint knows {len(unknown)} questions that the data no longer has, "
            f"such as {min(unknown)}"
        )
