"""Gold answers that a reward cannot use, found before the first step is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exgrpo_fast.core.types import RewardSample
from exgrpo_fast.rewards.pool.pool import RewardPool

MORE_TRIES = 3  # of an answer that took too long


class HasGold(Protocol):
    """A `Question`, or a row that was read without a tokenizer."""

    @property
    def id(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class BadGold:
    """`index` counts the questions from 0. Reasons of `math_verify`:

    unparsable           math-verify cannot read it: only the very same text would be right
    unbalanced           its braces do not close, so that no box can hold it
    not_equal_to_itself  read twice, it does not compare equal
    """

    index: int
    question_id: str
    answer: str
    reason: str


def check_golds(
    questions: Sequence[HasGold],
    pool: RewardPool,
    on_finished: Callable[[int], object] = lambda count: None,
) -> list[BadGold]:
    r"""Score every gold answer against itself, without the shortcuts that accept equal text.

    Asks the `check_gold` of each reward function; functions without one (a user's own, as a rule)
    know what they accept and are not asked. Up to 50 ms of a core per answer that is no number.
    A time-out says as much of a busy machine as of an answer: those are tried again, one at a time.
    """
    samples = [RewardSample("", "", q.answer, q.columns) for q in questions]
    verdicts = pool.score(samples, checking_gold=True, on_finished=on_finished)
    for _ in range(MORE_TRIES):
        for index, verdict in enumerate(verdicts):
            if verdict.reason == "timeout":
                [verdicts[index]] = pool.score([samples[index]], checking_gold=True)
    usable = ("ok", "any_answer", "unscored")
    return [
        BadGold(index, question.id, question.answer, verdict.reason)
        for index, (question, verdict) in enumerate(zip(questions, verdicts, strict=True))
        if verdict.reason not in usable
    ]
