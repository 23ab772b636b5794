"""`python -m exgrpo_kernels`: what would run on this machine, and one case against float64."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from exgrpo_kernels.runtime import resolve_backend
from exgrpo_kernels.self_check import compare_with_float64


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    print(f"torch {torch.__version__}, Triton {installed('triton')}, device {device} ({name})")
    print(f"backend: {resolve_backend('auto', device, torch.float32)}")
    found = compare_with_float64(device)
    for part, fused, plain, _ in found:
        print(f"{part}: error {fused:.1e}, plain PyTorch {plain:.1e}, against float64")
    is_correct = all(part.is_within_bound for part in found)
    print("correct" if is_correct else "WRONG: please report this output")
    return 0 if is_correct else 1


if __name__ == "__main__":
    sys.exit(main())
