"""When a drafted token is thrown away and drawn anew from the prior, and the law that results.

In a state s let p be the policy, r the prior. Draw y from p, keep it with probability a(y), else
draw the token of this position from r. With R = sum_y p(y) (1 - a(y)) the emitted token has the law

    mu(y, kept) = p(y) a(y)        mu(y, redrawn) = R r(y)        mu = p a + R r

since the replacement does not depend on what it replaces (docs/eapo.md). Every rule is a choice of
a; what it looks at is its statistic, and a threshold tau divides:

    ratio       a = 1[delta <= tau], delta = log p(y) - log r(y)      EAPO, arXiv 2606.30420, eqs. 6-8
    soft_ratio  a = min(1, e^(tau - delta))
    defensive   ratio, but a share of the drafts skips the test: a = rate + (1 - rate) 1[delta <= tau]
    entropy     a = 1[H(p) <= tau]                                    a test of the state alone,
    kl          a = 1[KL(p || r) <= tau]                              as are the three below
    tv          a = 1[TV(p, r) <= tau]
    js          a = 1[JS(p, r) <= tau]                                arXiv 2603.22446 switches so
    random      a = 1 - rate, whatever was drafted
    none        a = 1

Legend of shapes: N states, V tokens. Any floating dtype; -inf is the log-probability of a token
that cannot occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["ratio", "soft_ratio", "defensive", "entropy", "kl", "tv", "js", "random", "none"]


def log_ratio(logp: Tensor, logr: Tensor) -> Tensor:
    """delta = log p - log r; +inf where the prior cannot say what the policy can."""
    return torch.where(logp == -torch.inf, -torch.inf, logp - logr)


def entropy(logp_NV: Tensor, logr_NV: Tensor) -> Tensor:
    """H(p) in nats, [N, V] -> [N]."""
    return -_expect(logp_NV, logp_NV)


def kl(logp_NV: Tensor, logr_NV: Tensor) -> Tensor:
    """KL(p || r) in nats, [N, V] -> [N]."""
    return _expect(logp_NV, logp_NV - logr_NV)


def tv(logp_NV: Tensor, logr_NV: Tensor) -> Tensor:
    """Total variation, half of sum |p - r|, [N, V] -> [N]."""
    return (logp_NV.exp() - logr_NV.exp()).abs().sum(-1) / 2


def js(logp_NV: Tensor, logr_NV: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, [N, V] -> [N]."""
    middle_NV = torch.logaddexp(logp_NV, logr_NV) - math.log(2)
    return (kl(logp_NV, middle_NV) + kl(logr_NV, middle_NV)) / 2


def _expect(logp_NV: Tensor, values_NV: Tensor) -> Tensor:
    p_NV = logp_NV.exp()
    return torch.where(p_NV > 0, p_NV * values_NV, 0.0).sum(-1)


STATE_STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": entropy,
    "kl": kl,
    "tv": tv,
    "js": js,
}


class Law(NamedTuple):
    """The joint law of the emitted token and its flag, and how often a draft is thrown away."""

    kept_NV: Tensor  # mu(y, kept)
    redrawn_NV: Tensor  # mu(y, redrawn)
    rate_N: Tensor  # R

    @property
    def emitted_NV(self) -> Tensor:
        """mu(y), which sums to 1."""
        return self.kept_NV + self.redrawn_NV


@dataclass(frozen=True)
class Trigger:
    """A rule with its threshold tau and, for `defensive` and `random`, its rate."""

    rule: Rule = "ratio"
    threshold: float = 0.5
    rate: float = 0.0

    @property
    def of_state(self) -> bool:
        """Whether the test looks at whole distributions instead of the drafted token."""
        return self.rule in STATE_STATISTICS

    @property
    def draws_lots(self) -> bool:
        """Whether a keep probability may lie between 0 and 1."""
        return self.rule in ("soft_ratio", "defensive", "random")

    def statistic(self, logp_NV: Tensor, logr_NV: Tensor) -> Tensor:
        """What is tested: of each state [N, 1] where the rule is one of states, else of each token
        [N, V]."""
        if self.of_state:
            return STATE_STATISTICS[self.rule](logp_NV, logr_NV)[..., None]
        return log_ratio(logp_NV, logr_NV)

    def keep_probability(self, statistic: Tensor) -> Tensor:
        """a, of the statistic's shape. A statistic that equals the threshold keeps the draft."""
        passed = (statistic <= self.threshold).to(statistic.dtype)
        if self.rule == "soft_ratio":
            return (self.threshold - statistic).clamp(max=0.0).exp()
        if self.rule == "defensive":
            return self.rate + (1 - self.rate) * passed
        if self.rule == "random":
            return torch.full_like(statistic, 1 - self.rate)
        return torch.ones_like(statistic) if self.rule == "none" else passed

    def law(self, logp_NV: Tensor, logr_NV: Tensor) -> Law:
        """[N, V] log-probabilities of policy and prior -> the law of one position."""
        p_NV = logp_NV.exp()
        keep_NV = self.keep_probability(self.statistic(logp_NV, logr_NV)).expand_as(p_NV)
        rate_N = (p_NV * (1 - keep_NV)).sum(-1)
        return Law(p_NV * keep_NV, rate_N[..., None] * logr_NV.exp(), rate_N)
