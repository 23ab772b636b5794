"""Solutions for reasoning-gym's chain_sum: what the warm start imitates.

    12 - 5 + 7   ->   12-5=7                      or a guess:   <answer>11</answer>
                      7+7=14
                      <answer>14</answer>

Some solutions show their steps, the others guess a number near the answer. A policy trained on both
is correct where it shows its steps and incorrect where it guesses, which leaves something for
reinforcement learning to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import numpy as np

from exgrpo_fast.config import GymTask
from exgrpo_fast.data.sources import gym_items
from exgrpo_fast.experience.hindsight.source import hindsight_text
from exgrpo_fast.rewards.rubrics.rubrics import SUMS_RUBRICS

GUESS_ERRORS = [error for error in range(-5, 6) if error]  # a guess is near, and wrong


def worked_solution(expression: str) -> str:
    """'12 - 5 + 7' -> the sum done from left to right, one step a line, then the answer."""
    total, *rest = expression.split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(term) if sign == "+" else int(total) - int(term)
        lines.append(f"{total}{sign}{term}={result}")
        total = str(result)
    return "\n".join([*lines, answer(total)])


def guess(correct: str, rng: np.random.Generator) -> str:
    return answer(int(correct) + rng.choice(GUESS_ERRORS))


def answer(value: object) -> str:
    return f"<answer>{value}</answer>"


def solved_examples(
    task: GymTask,
    *,
    guess_share: float,
    seed: int,
    revision_share: float = 0.0,
    leave_out: AbstractSet[str] = frozenset(),
) -> Iterator[tuple[str, str]]:
    """(question, solution) for the rows of a chain_sum task but those to leave out.

    Where a solution is a revision, the question holds the wrong one and what it missed.
    """
    rng = np.random.default_rng(seed)
    for row in gym_items(task.gym, task.size, task.seed, task.options):
        question, solution = row["question"], worked_solution(row["metadata"]["expression"])
        pair = question, solution
        if revision_share and rng.random() < revision_share:
            draft, checks = wrong_draft(solution, row["answer"], rng)
            pair = hindsight_text(question, draft, *met_and_missed(checks)), solution
        elif rng.random() < guess_share:
            pair = question, guess(row["answer"], rng)
        if question not in leave_out:
            yield pair


def wrong_draft(solution: str, correct: str, rng: np.random.Generator) -> tuple[str, set[str]]:
    """(a guess, or the steps with a wrong end; the rubrics it misses)."""
    if rng.random() < 0.5:
        return guess(correct, rng), {"answer_correct", "steps_true"}
    wrong = str(int(correct) + rng.choice(GUESS_ERRORS))
    *steps, last, _ = solution.split("\n")
    false_step = f"{last.rpartition('=')[0]}={wrong}"
    return "\n".join([*steps, false_step, answer(wrong)]), {"answer_correct", "steps_true"}


def met_and_missed(missed: AbstractSet[str]) -> tuple[list[str], list[str]]:
    """The public words of the rubrics `sums_rubrics`, as a hindsight prompt lists them."""
    texts = {r.name: r.public_text for r in SUMS_RUBRICS if r.applies_to == "all"}
    return (
        [text for name, text in texts.items() if name not in missed],
        [text for name, text in texts.items() if name in missed],
    )
