"""One case of the fused loss on a device, against float64 and beside plain PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels.objective import PolicyObjective
from exgrpo_kernels.policy_loss import linear_policy_loss, linear_policy_loss_reference

# No multiple of any block size.
NUM_TOKENS, NUM_COLUMNS, WIDTH = 67, 1003, 96
PLAIN_ERRORS = 2.0  # times the error of plain PyTorch in the same dtype
# float32 products leave 1e-6; TF32 tensor cores, where a GPU uses them, keep 10 bits of mantissa.
ROUNDING = {"cpu": 1e-6, "cuda": 5e-3}


class PartError(NamedTuple):
    """Largest error of one result, relative to its largest entry in float64."""

    part: str
    fused: float
    plain: float
    is_within_bound: bool


def compare_with_float64(device: torch.device | str) -> list[PartError]:
    """The loss and both gradients on `device` in float32."""
    device = torch.device(device)
    inputs = _inputs(device)
    exact = _loss_and_gradients(linear_policy_loss_reference, inputs, torch.float64)
    plain = _loss_and_gradients(linear_policy_loss_reference, inputs, torch.float32)
    fused = _loss_and_gradients(linear_policy_loss, inputs, torch.float32)
    found = []
    for part, e, p, f in zip(("loss", "d hidden", "d weight"), exact, plain, fused, strict=True):
        ours, peer = (float((t - e).abs().max() / e.abs().max()) for t in (f, p))
        is_within = ours <= PLAIN_ERRORS * peer + ROUNDING[device.type]  # False for NaN
        found.append(PartError(part, ours, peer, is_within))
    return found


def _inputs(device: torch.device) -> dict[str, Tensor]:
    """A micro-batch with both signs of advantage, ratios on both sides of the clip, one padded row."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=g)
    weight = torch.randn(NUM_COLUMNS, WIDTH, generator=g) / WIDTH**0.5
    targets = torch.randint(NUM_COLUMNS, (NUM_TOKENS,), generator=g)
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)
    weights[-1] = 0.0
    columns = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "advantages": torch.randn(NUM_TOKENS, generator=g),
        "behaviour_logprobs": logprobs + 0.3 * torch.randn(NUM_TOKENS, generator=g),
        "weights": weights,
    }
    return {name: value.to(device) for name, value in columns.items()}


def _loss_and_gradients(
    function: Callable, inputs: dict[str, Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Loss, d hidden and d weight as float64."""
    leaves = {n: inputs[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "weight")}
    others = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    made = function(**(others | leaves), objective=PolicyObjective(entropy_coef=0.01))
    made.loss.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [t.double() for t in (made.loss.detach(), *gradients)]
