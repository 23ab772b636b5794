"""How a replayed trajectory weighs: a choice of the columns it fills, never of another loss.

With r = pi_now / pi_stored, per token:

    shaped      r / (r + beta), never clipped   ExGRPO, arXiv 2510.02245, section 3.3
    importance  r, never clipped                the same without shaping
    clipped     r with PPO's clip               RePO, arXiv 2506.09340, eq. 5
    none        pi_now / pi_start with PPO's clip, pi_start = the weights of the step's start: the
                age of the trajectory is not corrected for    RLEP, arXiv 2507.07451, section 3
    proximal    r, clipped around pi_start / pi_stored instead of 1    ReMix, arXiv 2507.06892, eq. 3

A trace of another model that comes without log-probs is stored with 0, so that r = pi_now; shaped,
this is LUFFY (arXiv 2504.14945, eq. 7).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from exgrpo_fast.core.types import Trajectory
from exgrpo_kernels import PolicyObjective

Weight = Literal["shaped", "importance", "clipped", "none", "proximal"]
NEEDS_START: frozenset[str] = frozenset({"none", "proximal"})
UNCLIPPED: frozenset[str] = frozenset({"shaped", "importance"})

# Where no ratio can reach the lower clip: the ratio is moved so far above it.
FAR_ABOVE = 1e3


def weighted(
    trajectory: Trajectory, weight: Weight, *, shaping: float, start_logprobs: Tensor | None
) -> Trajectory:
    """A replayed trajectory with the denominators and the shaping of its weight."""
    if weight == "shaped":
        return replace(trajectory, shaping=shaping)
    if weight in NEEDS_START:
        assert start_logprobs is not None, weight
        if weight == "none":
            return replace(trajectory, behaviour_logprobs=start_logprobs)
        return replace(trajectory, proximal_logprobs=start_logprobs)
    return trajectory


class MovedClip(NamedTuple):
    """Denominators [T] and factors [T] whose ordinary clip is the moved one."""

    behaviour_logprobs: Tensor
    factors: Tensor


def moved_clip(
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantage: float,
    objective: PolicyObjective,
) -> MovedClip:
    """min(r A, clip(r, v - low, v + high) A) with v = pi_start / pi_stored, as plain columns.

    With s = (v + high) / (1 + high), r / s reaches 1 + high exactly where r reaches v + high; and
    s x min(r / s A, clip(r / s) A) is the wanted term. So s goes into the denominators and into
    the advantages, where it leaves KL and entropy alone. For A < 0 the same holds of the lower
    bound; where v <= low it is out of reach.
    """
    v = (proximal_logprobs - behaviour_logprobs).exp()
    low, high = objective.clip_low, objective.clip_high
    s = v
    if advantage > 0 and high is not None:
        s = (v + high) / (1 + high)
    if advantage < 0 and low is not None:
        s = torch.where(v > low, (v - low).clamp(min=1e-6) / (1 - low), v / FAR_ABOVE)
    return MovedClip(behaviour_logprobs + s.log(), s)
