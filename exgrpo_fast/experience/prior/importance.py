"""What a prior-guided completion is to the loss: denominators, and a factor of its weights.

Per token of one completion: old = log pi_old (trainer), prior = log r, g = was it redrawn, mu = the
exact law of the emitted token. rho = mean g. Sums and means run over the tokens of the completion.

    none         denominators old                                     EAPO's "w/o sIS"
    sis_token    log((1 - rho) pi_old + rho r), by the token          EAPO, eqs. 11-12 (the default)
    sis_seq      the same of whole completions: every ratio starts at pi_old(o) / pi~(o)
    sis_geo      its |o|-th root
    flag_token   old where kept, prior where redrawn: biased, the tempting one
    exact_token  factor min(pi_old / mu, cap) of each token
    exact_traj   factor min(product of them, cap): unbiased without the cap
    mis          the balance heuristic, factor of ALL completions of the group (`balance_weight`)

The smoothed forms change the denominators, so that the clip sees the whole ratio, as the paper's
does. The exact ones change the weights: the correction of the sampling is not clipped, the ratio
to pi_old is. docs/eapo.md says which are unbiased for what.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Importance = Literal[
    "none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis"
]
NEEDS_LAW: frozenset[str] = frozenset({"exact_token", "exact_traj", "mis"})


class Columns(NamedTuple):
    """Of one completion."""

    behaviour_logprobs: Tensor  # [T]
    token_weights: Tensor | None = None  # [T], factors of the weights; None = 1


def columns_of(
    importance: Importance,
    *,
    old_T: Tensor,
    prior_T: Tensor,
    redrawn_T: Tensor,
    mu_T: Tensor | None = None,
    cap: float = math.inf,
) -> Columns:
    """The columns of one prior-guided completion; log-probabilities in any floating dtype.

    `mu_T`: log mu, for the exact modes (NEEDS_LAW); "mis" gets its factor from the group.
    """
    rho = float(redrawn_T.double().mean())
    if importance == "sis_token":
        return Columns(mixture(old_T, prior_T, rho))
    if importance in ("sis_seq", "sis_geo"):
        start = old_T.sum() - mixture(old_T.sum(), prior_T.sum(), rho)
        return Columns(old_T - (start / len(old_T) if importance == "sis_geo" else start))
    if importance == "flag_token":
        return Columns(torch.where(redrawn_T, prior_T, old_T))
    if importance == "exact_token":
        assert mu_T is not None
        return Columns(old_T, (old_T - mu_T).exp().clamp(max=cap))
    if importance == "exact_traj":
        assert mu_T is not None
        return Columns(old_T, (old_T - mu_T).sum().exp().clamp(max=cap).expand_as(old_T))
    return Columns(old_T)


def mixture(old: Tensor, prior: Tensor, rho: float) -> Tensor:
    """log((1 - rho) e^old + rho e^prior), exact at both ends."""
    if rho in (0.0, 1.0):
        return prior if rho else old
    return torch.logaddexp(math.log1p(-rho) + old, math.log(rho) + prior)


def balance_weight(log_mu_over_p: Tensor, *, group_size: int, num_guided: int = 1) -> Tensor:
    """p / (((G - m) p + m mu) / G) of a completion; at most G / (G - m) (Veach, Guibas 1995)."""
    guided = num_guided / group_size
    return 1 / ((1 - guided) + guided * log_mu_over_p.exp())
