"""Group statistics: rewards of one group -> one advantage per trajectory.

A group whose rewards are all equal gets exactly 0 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from exgrpo_fast.core.types import Group

Advantage = Callable[..., list[float]]  # (rewards, of=None): `of` are those the statistics are of
Baseline = Literal["pooled", "fresh", "split"]


def grpo(rewards: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """(r - mean) / std with the population std, so |A| <= sqrt(K) (arXiv 2402.03300, eq. 3)."""
    centred = dr_grpo(rewards, of)
    spread = dr_grpo(of) if of is not None else centred
    std = math.sqrt(sum(a * a for a in spread) / len(spread))
    return [a / std for a in centred] if std > 0.0 else centred


def grpo_sample_std(rewards: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """(r - mean) / (std + 1e-6) with the sample std, over K - 1: what verl computes, and HeRL's
    published code with it."""
    centred = dr_grpo(rewards, of)
    spread = dr_grpo(of) if of is not None else centred
    std = math.sqrt(sum(a * a for a in spread) / max(len(spread) - 1, 1))
    return [a / (std + 1e-6) for a in centred]


def dr_grpo(rewards: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """r - mean: no division by the std (Dr.GRPO, arXiv 2503.20783, section 3.2)."""
    of = rewards if of is None else of
    if len({*rewards, *of}) <= 1:
        return [0.0] * len(rewards)  # the mean of equal floats need not be that float
    mean = sum(of) / len(of)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """r - mean of the others (RLOO, arXiv 2402.14740, eq. 8); of all, where it is not among them."""
    if of is not None:
        return dr_grpo(rewards, of)
    others = max(len(rewards) - 1, 1)
    return [a * len(rewards) / others for a in dr_grpo(rewards)]


def quantile(
    rewards: Sequence[float],
    of: Sequence[float] | None = None,
    *,
    share: float = 0.4,
    std: Literal["population", "sample"] = "population",
) -> list[float]:
    """(r - b) / std, b the smallest reward at or below which `share` of them lie (arXiv 2509.22611).

    With rewards 0 and 1 and a success rate of at most 1 - share, b is 0 and only successes have an
    advantage; above it b is 1 and only failures have one. The advantages of a group do not add up
    to 0. The authors' code interpolates between rewards, which the paper does not.
    """
    of = rewards if of is None else of
    if len({*rewards, *of}) <= 1:
        return [0.0] * len(rewards)
    baseline = sorted(of)[max(math.ceil(share * len(of) - 1e-9), 1) - 1]
    mean = sum(of) / len(of)
    divisor = len(of) if std == "population" else max(len(of) - 1, 1)
    spread = math.sqrt(sum((r - mean) ** 2 for r in of) / divisor)
    return [(r - baseline) / spread if spread > 0 else r - baseline for r in rewards]


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


@dataclass(frozen=True)
class AdvantageRule:
    """How a run turns the rewards of a group into its advantages."""

    advantage: Advantage = grpo
    baseline: Baseline = "pooled"

    def apply(self, group: Group) -> Group:
        """The group with its advantages. Applied once, when its rewards are final."""
        advantages = group_advantages(
            group.rewards,
            group.replayed,
            advantage=self.advantage,
            baseline=self.baseline,
            weights=[t.baseline_weight for t in group.trajectories],
        )
        return replace(group, advantages=tuple(advantages))


def group_advantages(
    rewards: Sequence[float],
    replayed: Sequence[bool],
    *,
    advantage: Advantage,
    baseline: Baseline = "pooled",
    weights: Sequence[float] = (),
) -> list[float]:
    """Advantages of a group in which some trajectories are replayed or importance-weighted.

    pooled  statistics of all: a replayed one counts like a fresh one (ExGRPO, arXiv 2510.02245,
            section 3.3; LUFFY, arXiv 2504.14945)
    fresh   statistics of the fresh ones for all: the replayed ones, chosen for their success, do
            not lift the baseline of the others
    split   fresh and replayed ones each by their own statistics (RePO, arXiv 2506.09340)

    `weights`: of the rewards in the mean, as of weighted importance sampling; the scale stays.
    """
    found = _by_baseline(rewards, replayed, advantage, baseline)
    if len(set(weights)) <= 1:
        return found
    mean = sum(w * a for w, a in zip(weights, found, strict=True)) / sum(weights)
    return [a - mean for a in found]


def _by_baseline(
    rewards: Sequence[float], replayed: Sequence[bool], advantage: Advantage, baseline: Baseline
) -> list[float]:
    if baseline == "pooled" or len(set(replayed)) <= 1:
        return advantage(rewards)
    fresh = [r for r, old in zip(rewards, replayed, strict=True) if not old]
    stored = [r for r, old in zip(rewards, replayed, strict=True) if old]
    of_fresh = iter(advantage(fresh))
    of_stored = iter(advantage(stored) if baseline == "split" else advantage(stored, of=fresh))
    return [next(of_stored if old else of_fresh) for old in replayed]
