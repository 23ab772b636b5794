"""Solutions for reasoning-gym's chain_sum: what the warm start imitates.

    12 - 5 + 7   ->   12-5=7                      or a guess:   <answer>11</answer>
                      7+7=14
                      <answer>14</answer>

Some solutions show their steps, the others guess an answer near the right one. A policy that has
seen both is right when it shows its steps and wrong when it guesses; that the one habit pays and
the other does not is what reinforcement learning finds out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from exgrpo_fast.config import GymTask

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


def solved_examples(task: GymTask, *, guess_share: float, seed: int) -> Iterator[tuple[str, str]]:
    """(question, solution) for every row of a chain_sum task."""
    import reasoning_gym

    rng = np.random.default_rng(seed)
    for row in reasoning_gym.create_dataset(
        task.gym, size=task.size, seed=task.seed, **task.options
    ):
        if rng.random() < guess_share:
            yield row["question"], guess(row["answer"], rng)
        else:
            yield row["question"], worked_solution(row["metadata"]["expression"])
