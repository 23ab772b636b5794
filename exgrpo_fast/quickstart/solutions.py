"""Worked solutions for reasoning-gym's chain_sum: what the warm start imitates.

12 - 5 + 7   ->   12 - 5 = 7
                  7 + 7 = 14
                  <answer>14</answer>
"""

from __future__ import annotations

from collections.abc import Iterator

from exgrpo_fast.config import GymTask


def worked_solution(expression: str) -> str:
    """'12 - 5 + 7' -> the sum done from left to right, one step a line, then the answer."""
    total, *rest = expression.split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(total) + int(term) if sign == "+" else int(total) - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return "\n".join([*lines, f"<answer>{total}</answer>"])


def worked_examples(task: GymTask) -> Iterator[tuple[str, str]]:
    """(question, worked solution) for every row of a chain_sum task."""
    import reasoning_gym

    for row in reasoning_gym.create_dataset(
        task.gym, size=task.size, seed=task.seed, **task.options
    ):
        yield row["question"], worked_solution(row["metadata"]["expression"])
