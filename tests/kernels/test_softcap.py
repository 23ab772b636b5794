"""The slope of the softcap s tanh(x / s), which is 1 / cosh^2(x / s), to the last digits.

As 1 - tanh^2 it has none left where tanh nears 1, so float64 autograd is no yardstick here either.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_policy_loss,
    policy_loss_from_logits,
    runtime,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch"]
if runtime.is_interpreting() or DEVICE.type == "cuda":
    BACKENDS.append("triton")

SOFTCAP = 4.0  # a power of two: x / s is exact
RATIOS = torch.linspace(-40.0, 40.0, 161).to(DEVICE)  # x / s, in steps of 1/2
SLOPES = RATIOS.double().cosh() ** -2


def assert_close_to_its_last_digits(ours: Tensor, truth: Tensor, digits: float) -> None:
    """Within `digits` units in the last place, and what exp makes of the rounding of 2 x / s."""
    assert ours.dtype == torch.float32
    error = (ours.double() / truth - 1).abs() / torch.finfo(torch.float32).eps
    allowed = digits + 2 * RATIOS.abs()
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), (
        f"x / s = {RATIOS[worst]}: {ours[worst]}, not {truth[worst]}: {error[worst]:.3g} units"
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_slope_itself(backend, temperature):
    """The only logit of its row is its log-sum-exp."""
    hidden = (SOFTCAP * RATIOS)[:, None].requires_grad_()
    out = linear_logprob(
        hidden,
        torch.ones(1, 1, device=DEVICE),
        torch.zeros(len(hidden), dtype=torch.int64, device=DEVICE),
        softcap=SOFTCAP,
        temperature=temperature,
        backend=backend,
    )
    (slope,) = torch.autograd.grad(out.lse.sum(), hidden)
    assert_close_to_its_last_digits(slope[:, 0], SLOPES / temperature, 4)


@pytest.mark.parametrize("function", ["linear_policy_loss", "policy_loss_from_logits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_loss(backend, function):
    """Two logits, x and 0, whose second is the target: -log p(target) has the gradient p slope."""
    x, ones = (SOFTCAP * RATIOS)[:, None].requires_grad_(), torch.ones_like(RATIOS)
    arguments = {
        "targets": torch.ones(len(x), dtype=torch.int64, device=DEVICE),
        "advantages": ones,
        "behaviour_logprobs": -ones,
        "weights": ones,
        "objective": PolicyObjective(surrogate="reinforce"),
        "softcap": SOFTCAP,
        "backend": backend,
    }
    if function == "linear_policy_loss":
        head = torch.tensor([[1.0], [0.0]], device=DEVICE)
        loss = linear_policy_loss(x, head, **arguments).loss
    else:
        loss = policy_loss_from_logits(torch.cat([x, 0 * x], 1), **arguments).loss
    (gradient,) = torch.autograd.grad(loss, x)
    p = torch.sigmoid(SOFTCAP * RATIOS.double().tanh())
    assert_close_to_its_last_digits(gradient[:, 0], p * SLOPES, 12)
