"""Group statistics: rewards of one group -> one advantage per trajectory.

The baseline is pooled: a replayed trajectory counts like a fresh one (ExGRPO, arXiv 2510.02245,
section 3.3). A group whose rewards are all equal gets exactly 0 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Advantage = Callable[[Sequence[float]], list[float]]


def grpo(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std with the population std, so |A| <= sqrt(K) (arXiv 2402.03300, eq. 3)."""
    centred = dr_grpo(rewards)
    std = math.sqrt(sum(a * a for a in centred) / len(centred))
    return [a / std for a in centred] if std > 0.0 else centred


def dr_grpo(rewards: Sequence[float]) -> list[float]:
    """r - mean: no division by the std (Dr.GRPO, arXiv 2503.20783, section 3.2)."""
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)  # the mean of equal floats need not be that float
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float]) -> list[float]:
    """r - mean of the others (RLOO, arXiv 2402.14740, eq. 8)."""
    others = max(len(rewards) - 1, 1)
    return [a * len(rewards) / others for a in dr_grpo(rewards)]


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
