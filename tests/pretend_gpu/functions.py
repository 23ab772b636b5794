"""Functions that are looked at above autograd: factories that read the host, and autocast.

Autocast's own code in PyTorch's core takes tensors of a real GPU alone, so its two lists for CUDA
stand here (aten/src/ATen/autocast_mode.h).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from pretend_gpu.tensor import CORE_DEVICE, PretendTensor, is_cuda, parse_to
from torch import Tensor

FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


def named(*names: str) -> set[Any]:
    """The functions of torch, Tensor and torch.nn.functional of these names."""
    owners = (torch, Tensor, F)
    return {getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)}


LOW = named("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv")
LOW |= named("linear", "conv1d", "scaled_dot_product_attention", "einsum")
FLOAT32 = named("exp", "expm1", "log", "log2", "log10", "log1p", "pow", "__pow__", "rsqrt", "norm")
FLOAT32 |= named(
    "reciprocal", "sum", "prod", "cumsum", "cumprod", "softmax", "log_softmax", "erfinv"
)
FLOAT32 |= named(
    "softplus", "layer_norm", "group_norm", "nll_loss", "mse_loss", "cosh", "sinh", "tan"
)


def from_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`torch.tensor(values, device="cuda")`: made on the host, then a blocking copy."""
    grad = kwargs.pop("requires_grad", False)
    del kwargs["device"]
    return func(*args, **kwargs).to(CORE_DEVICE).requires_grad_(grad)


def new_tensor(tensor: Tensor, values: Any, **kwargs: Any) -> Tensor:
    """`Tensor.new_tensor`, which reads the host as `torch.tensor` does."""
    return from_host(torch.tensor, (values,), {"dtype": tensor.dtype, "device": "cuda"} | kwargs)


def with_index_tensors(index: Any) -> Any:
    """An index in which lists are tensors of the host, where PyTorch's core would make them."""
    if isinstance(index, tuple):
        return tuple(map(with_index_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`to` and `cuda` of a CPU tensor, by the device that PyTorch's core knows."""
    tensor, *rest = args
    if func is Tensor.cuda:
        return tensor.to(CORE_DEVICE, non_blocking=kwargs.get("non_blocking", False))
    options = parse_to(rest, kwargs)
    if is_cuda(options["device"]):
        options["device"] = CORE_DEVICE
    return tensor.to(**options)


def autocast(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments as `torch.autocast("cuda")` hands them on; it leaves calls with `out` alone."""
    if not torch.is_autocast_enabled("cuda") or kwargs.get("out") is not None:
        return args, kwargs
    if func in LOW:
        dtype = torch.get_autocast_dtype("cuda")
    elif func in FLOAT32 and kwargs.get("dtype") is None:
        dtype = torch.float32
    else:
        return args, kwargs

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, PretendTensor) and value.is_floating_point()
        return value.to(dtype) if is_cast and value.dtype != torch.float64 else value

    return pytree.tree_map(cast, args), pytree.tree_map(cast, kwargs)
