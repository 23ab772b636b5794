r"""The body of `exgrpo-fast reward-test`: what does a reward accept, and how long does it take?

Three questions, each with a boxed answer: does every gold answer earn the reward itself, does the
gold answer of another row earn nothing, and does the reward withstand the answers of adversarial.py?
"Accepted" is what counts as correct everywhere: full marks of every function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exgrpo_fast.core.types import RewardSample
from exgrpo_fast.data import DataError, check_data
from exgrpo_fast.rewards.pool.pool import RewardPool
from exgrpo_fast.rewards.selftest.adversarial import (
    IN_TIME_MS,
    Adversarial,
    adversarial_answers,
    box,
)
from exgrpo_fast.rewards.verifiers.numerals import plain_form

NUM_SHOWN = 5  # of each kind of failure

_NUMBERS = "72 -5 0 1,234 0.25 3.5e8 18.00 100000 2024 \\$7.50".split()
_FORMULAS = [
    "\\frac{1}{2}",
    "-\\frac{14}{3}",
    "2\\sqrt{3}",
    "\\frac{3\\pi}{4}",
    "1+\\sqrt{19}",
    "6-5i",
    "x^2+2x+1",
    "y = 2x+3",
    "(3, \\frac{\\pi}{2})",
    "[0,1)",
    "(-\\infty, 2) \\cup (3, \\infty)",
    "\\{1,2,3\\}",
    "1,-2",
    "62.5\\%",
    "90^\\circ",
    "864 \\mbox{ inches}^2",
    "52_8",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "\\text{Evelyn}",
    "\\text{(C)}",
    "2^{10}",
    "x \\leq 4",
]
_OWN_GOLDS = {"gsm8k": _NUMBERS, "last_number": _NUMBERS, "multiple_choice": list("ABCDEFGHIJ")}


def built_in_golds(functions: Sequence[str]) -> list[RewardSample]:
    """A few dozen answers of every kind that the first function is made for; no completions."""
    answers = _OWN_GOLDS.get(functions[0], _NUMBERS + _FORMULAS)
    return [RewardSample("", "", answer) for answer in answers]


def golds_of(
    paths: Sequence[str], *, prompt_field: str | None = None, answer_field: str | None = None
) -> list[RewardSample]:
    """The good rows of all files, without completions. DataError where a file cannot be read or has none."""
    golds: list[RewardSample] = []
    for path in paths:
        report = check_data(Path(path), prompt_field=prompt_field, answer_field=answer_field)
        if not report.rows:
            raise DataError(f"{path}: no good row; see exgrpo-fast check-data {path}")
        for row in report.rows:
            prompt = row.prompt if isinstance(row.prompt, str) else ""
            golds.append(RewardSample(prompt, "", row.answer, row.columns))
    return golds


@dataclass(frozen=True)
class Trial:
    """What came out; texts are of the first few failures."""

    functions: list[str]
    num_golds: int
    golds_failed: list[str]  # with the reason
    num_others: int
    others_accepted: list[str]
    num_adversarial: int
    adversarial_late: list[str]
    adversarial_accepted: list[str]
    adversarial_refused: list[str]  # honest ones among them
    milliseconds: list[float]  # of every distinct verdict, sorted
    reasons: dict[str, int]

    @property
    def passed(self) -> bool:
        """No gold answer fails and no adversarial answer is accepted."""
        return not self.golds_failed and not self.adversarial_accepted

    def as_dict(self) -> dict[str, Any]:
        return {
            "functions": self.functions,
            "passed": self.passed,
            "golds": {
                "rows": self.num_golds,
                "accepted_percent": _percent_other(self.golds_failed, self.num_golds),
                "failed": self.golds_failed[:NUM_SHOWN],
            },
            "answers_of_other_rows": {
                "rows": self.num_others,
                "rejected_percent": _percent_other(self.others_accepted, self.num_others),
                "accepted": self.others_accepted[:NUM_SHOWN],
            },
            "adversarial": {
                "answers": self.num_adversarial,
                "late": self.adversarial_late,
                "wrongly_accepted": self.adversarial_accepted,
                "wrongly_rejected": self.adversarial_refused,
            },
            "milliseconds": {
                "p50": _quantile(self.milliseconds, 0.5),
                "p99": _quantile(self.milliseconds, 0.99),
                "max": _quantile(self.milliseconds, 1.0),
            },
            "timeouts": self.reasons.get("timeout", 0),
            "reasons": self.reasons,
        }

    def __str__(self) -> str:
        figures = self.as_dict()
        golds, others = figures["golds"], figures["answers_of_other_rows"]
        times, reasons = figures["milliseconds"], figures["reasons"]
        in_time = self.num_adversarial - len(self.adversarial_late)
        wrong = len(self.adversarial_accepted) + len(self.adversarial_refused)
        lines = [
            f"reward            {', '.join(self.functions)}",
            f"gold answers      {golds['accepted_percent']:.1f} % of {self.num_golds} accepted",
            *_listed(self.golds_failed),
            f"other rows' golds {others['rejected_percent']:.1f} % of {self.num_others} rejected",
            *_listed(self.others_accepted),
            f"adversarial       {in_time} of {self.num_adversarial} scored or stopped in time, "
            f"{wrong} verdicts wrong",
            *_listed([f"late: {name}" for name in self.adversarial_late]),
            *_listed([f"accepted: {name}" for name in self.adversarial_accepted]),
            *_listed([f"refused though correct: {name}" for name in self.adversarial_refused]),
            f"time              p50 {times['p50']:.2f} ms, p99 {times['p99']:.0f} ms, "
            f"max {times['max']:.0f} ms; {figures['timeouts']} time-outs",
            "reasons           " + ", ".join(f"{name} {count}" for name, count in reasons.items()),
            "passed" if self.passed else "FAILED",
        ]
        return "\n".join(lines)


def check_reward(
    functions: Sequence[str],
    golds: Sequence[RewardSample],
    *,
    adversarial: Sequence[Adversarial] | None = None,
    workers: int = 2,
) -> Trial:
    """Judge gold answers, answers of other rows and adversarial answers, and count what goes wrong.

    RewardError for a reward that cannot be used.
    """
    adversarial = adversarial_answers() if adversarial is None else adversarial
    others = list(_answers_of_others(golds))
    gold_samples = [gold._replace(completion=box(gold.answer)) for gold in golds]
    other_samples = [gold._replace(completion=box(answer)) for gold, answer in others]
    columns = golds[0].columns  # of the first row, so that a reward that asks for some has them
    adversarial_samples = [RewardSample("", n.completion, n.gold, columns) for n in adversarial]
    with RewardPool(functions, workers=workers) as pool:
        pool.check(*gold_samples[:3])
        of_golds, of_others = pool.score(gold_samples), pool.score(other_samples)
        of_adversarial = pool.score(adversarial_samples)
    everything = [*of_golds, *of_others, *of_adversarial]
    pairs = list(zip(adversarial, of_adversarial, strict=True))
    return Trial(
        functions=list(functions),
        num_golds=len(golds),
        golds_failed=[
            f"{gold.answer!r}: {scored.reason}"
            for gold, scored in zip(golds, of_golds, strict=True)
            if not scored.successful
        ],
        num_others=len(others),
        others_accepted=[
            f"{answer!r} for {gold.answer!r}"
            for (gold, answer), scored in zip(others, of_others, strict=True)
            if scored.successful
        ],
        num_adversarial=len(adversarial),
        adversarial_late=[n.name for n, s in pairs if s.milliseconds > IN_TIME_MS],
        adversarial_accepted=[n.name for n, s in pairs if s.successful and not n.correct],
        adversarial_refused=[n.name for n, s in pairs if n.correct and not s.successful],
        milliseconds=sorted(scored.milliseconds for scored in everything),
        reasons=dict(Counter(scored.reason for scored in everything).most_common()),
    )


def _answers_of_others(golds: Sequence[RewardSample]) -> Iterable[tuple[RewardSample, str]]:
    """Each row with the next answer that reads differently."""
    for index, gold in enumerate(golds):
        for distance in range(1, len(golds)):
            other = golds[(index + distance) % len(golds)]
            if plain_form(other.answer) != plain_form(gold.answer):
                yield gold, other.answer
                break


def _percent_other(these: Sequence[str], total: int) -> float:
    return 100.0 * (total - len(these)) / total if total else 100.0


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _listed(texts: Sequence[str]) -> list[str]:
    more = (
        [f"                  and {len(texts) - NUM_SHOWN} more"] if len(texts) > NUM_SHOWN else []
    )
    return [f"                  {text[:200]}" for text in texts[:NUM_SHOWN]] + more
