"""The weights of replayed rows: columns whose ordinary loss is the formula of the paper."""

from __future__ import annotations

import pytest
import torch

from exgrpo_fast.experience.replay.weighting import moved_clip
from exgrpo_kernels import PolicyObjective, policy_loss

CLIPPED = PolicyObjective(clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_remix_clips_around_the_ratio_of_the_steps_start(advantage: float) -> None:
    """min(r A, clip(r, v - low, v + high) A), value and gradient, against autograd in float64.

    v from far below the clip's width (no lower bound) to far above 1.
    """
    generator = torch.Generator().manual_seed(0)
    stored = -3 * torch.rand(4000, generator=generator)
    start = stored + 1.5 * torch.randn(4000, generator=generator)
    now = start + 0.4 * torch.randn(4000, generator=generator)
    v = (start - stored).exp().double()
    assert (v < 0.2).sum() > 100 and (v > 3).sum() > 100

    exact = now.double().requires_grad_()
    r = (exact - stored).exp()
    clipped = torch.minimum(torch.maximum(r, v - 0.2), v + 0.28)
    expected = -torch.minimum(r * advantage, clipped * advantage).sum()
    expected.backward()

    ours = now.clone().requires_grad_()
    moved = moved_clip(stored, start, advantage, CLIPPED)
    result = policy_loss(
        ours,
        torch.zeros(4000),
        advantages=advantage * moved.factors,
        behaviour_logprobs=moved.behaviour_logprobs,
        weights=torch.ones(4000),
        objective=CLIPPED,
    )
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None and exact.grad is not None
    off = (ours.grad.double() - exact.grad).abs() > 1e-4 * exact.grad.abs().clamp(min=1e-3)
    edge = (r - v).abs().sub(torch.where(r > v, 0.28, 0.2)).abs() < 1e-4
    assert not (off & ~edge).any(), "a gradient differs away from the edge of the clip"
    assert (exact.grad == 0).sum() > 400  # clipped ones are among them


def test_without_a_clip_the_ratio_is_the_plain_one() -> None:
    stored, start = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.5])
    moved = moved_clip(stored, start, 1.0, PolicyObjective(clip_low=None, clip_high=None))
    assert torch.allclose(moved.behaviour_logprobs, start)
    assert torch.allclose(moved.factors, (start - stored).exp())
