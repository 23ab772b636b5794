"""What guiding by a prior took in a step, and what came of it, as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.types import Group, Trajectory

DECILES = 10


@dataclass(frozen=True)
class GuidanceCost:
    """Counts and sums over the completions that were guided; those of several calls add up."""

    rounds: int = 0
    drafted: int = 0
    tokens: int = 0
    seconds_draft: float = 0.0
    seconds_score: float = 0.0
    seconds_draw: float = 0.0
    divergence: float = 0.0  # sum of log pi - log r over the tokens of some fresh completions
    divergence_tokens: int = 0
    rates: float = 0.0  # sum of R over guided tokens, where the exact law was taken
    rate_tokens: int = 0

    def __add__(self, other: GuidanceCost) -> GuidanceCost:
        return GuidanceCost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def guidance_metrics(groups: Sequence[Group], cost: GuidanceCost) -> dict[str, Any]:
    """Nothing where nothing was guided. `groups`: all that were generated in the step."""
    guided = [t for group in groups for t in group.from_source("prior")]
    if not guided:
        return {}
    shares = [float(t.guidance.redrawn.float().mean()) for t in guided if t.guidance]
    return {
        "prior_completions": len(guided),
        "prior_redrawn_frac": fmean(shares),
        "prior_redrawn_p10": float(np.quantile(shares, 0.1)),
        "prior_redrawn_p90": float(np.quantile(shares, 0.9)),
        "prior_redrawn_by_decile": redrawn_by_decile(guided),
        "prior_reward_mean": fmean(t.reward for t in guided),
        "prior_pass_at_1": fmean(t.successful for t in guided),
        "prior_kept_frac": fmean(not t.masked for t in guided),
        "prior_groups_mixed": sum(mixed_only_by_guidance(group) for group in groups),
        "prior_same_token_frac": same_token_share(guided),
        "prior_tested_at_triggers": tested_at_triggers(guided),
        "prior_completion_len": fmean(t.num_tokens for t in guided),
        "prior_tokens": cost.tokens,
        "prior_rounds": cost.rounds,
        "prior_tokens_per_round": ratio(cost.tokens, cost.rounds),
        "prior_waste": ratio(cost.drafted, cost.tokens),
        "prior_kl": ratio(cost.divergence, cost.divergence_tokens),
        "prior_rate_mean": ratio(cost.rates, cost.rate_tokens),
        "prior_seconds_draft": cost.seconds_draft,
        "prior_seconds_score": cost.seconds_score,
        "prior_seconds_draw": cost.seconds_draw,
    }


def ratio(total: float, count: int) -> float | None:
    return total / count if count else None


def redrawn_by_decile(guided: Sequence[Trajectory]) -> list[float | None]:
    """Share of redrawn tokens in each tenth of the completions, from their beginning."""
    redrawn, decile = [], []
    for t in guided:
        if t.guidance is not None:
            redrawn.append(t.guidance.redrawn.double())
            decile.append(torch.arange(t.num_tokens) * DECILES // t.num_tokens)
    of_token = torch.cat(decile)
    counts = torch.bincount(of_token, minlength=DECILES)
    sums = torch.bincount(of_token, torch.cat(redrawn), minlength=DECILES)
    return [
        ratio(total, count) for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def mixed_only_by_guidance(group: Group) -> bool:
    own = tuple(t for t in group.trajectories if t.source != "prior")
    return group.learnable and not Group(group.question, own).learnable


def same_token_share(guided: Sequence[Trajectory]) -> float | None:
    """Of the tokens that were redrawn those that came out as they were."""
    rejected = at_triggers(guided, "rejected")
    emitted = torch.cat([t.token_ids[t.guidance.redrawn] for t in guided if t.guidance])
    return float((rejected == emitted).double().mean()) if len(emitted) else None


def tested_at_triggers(guided: Sequence[Trajectory]) -> float | None:
    """Mean statistic of the drafts that were thrown away, where it is finite."""
    tested = at_triggers(guided, "tested")
    tested = tested[tested.isfinite()]
    return float(tested.mean()) if len(tested) else None


def at_triggers(guided: Sequence[Trajectory], name: str) -> Tensor:
    return torch.cat([getattr(t.guidance, name)[t.guidance.redrawn] for t in guided if t.guidance])
