"""`python -m exgrpo_kernels`: what would run on this machine, and one case against float64."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_policy_loss, linear_policy_loss_reference
from exgrpo_kernels.runtime import resolve_backend

NUM_TOKENS, NUM_COLUMNS, WIDTH = 64, 1000, 96
# times the error of plain PyTorch in the same dtype
ALLOWED = 2.0


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def case(device: torch.device) -> dict[str, Tensor]:
    """One micro-batch [N = 64, V = 1000, D = 96] with both signs of advantage and one padded row."""
    g = torch.Generator().manual_seed(0)
    weights = torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)
    weights[-1] = 0.0
    columns = {
        "hidden": torch.randn(NUM_TOKENS, WIDTH, generator=g),
        "weight": torch.randn(NUM_COLUMNS, WIDTH, generator=g) / WIDTH**0.5,
        "targets": torch.randint(NUM_COLUMNS, (NUM_TOKENS,), generator=g),
        "advantages": torch.randn(NUM_TOKENS, generator=g),
        "behaviour_logprobs": -7 + torch.rand(NUM_TOKENS, generator=g),
        "weights": weights,
    }
    return {name: value.to(device) for name, value in columns.items()}


def loss_and_gradients(function, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Loss, d hidden and d weight as float64."""
    leaves = {n: inputs[n].to(dtype, copy=True).requires_grad_() for n in ("hidden", "weight")}
    others = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    made = function(**(others | leaves), objective=PolicyObjective(entropy_coef=0.01))
    made.loss.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [t.double() for t in (made.loss.detach(), *gradients)]


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    print(f"torch {torch.__version__}, Triton {installed('triton')}, device {device} ({name})")
    inputs = case(device)
    print(f"backend: {resolve_backend('auto', device, torch.float32)}")
    exact = loss_and_gradients(linear_policy_loss_reference, inputs, torch.float64)
    plain = loss_and_gradients(linear_policy_loss_reference, inputs, torch.float32)
    fused = loss_and_gradients(linear_policy_loss, inputs, torch.float32)
    is_right = True
    for part, e, p, f in zip(("loss", "d hidden", "d weight"), exact, plain, fused, strict=True):
        scale = e.abs().max()
        ours, peer = ((t - e).abs().max() / scale for t in (f, p))
        is_right &= bool(ours <= ALLOWED * peer + 1e-6)
        print(f"{part}: error {ours:.1e}, plain PyTorch {peer:.1e}, against float64")
    print("right" if is_right else "WRONG: please report this output")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
