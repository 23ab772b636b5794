"""A tensor that says it is on cuda:0, around a CPU tensor that holds its values.

PyTorch's C++ core sees a tensor of the lazy device: the only one besides cpu and meta that a build
without CUDA can differentiate on, and that nothing else uses. So `.to`, `.cpu()`, `.numpy()`,
`tolist()` and autograd's copies between devices run their own code; only the device that Python sees
is replaced. Every operation arrives at `operations.run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
CORE_DEVICE = torch.device("lazy", 0)


class PretendTensor(Tensor):
    """`values`: the CPU tensor behind it; sizes and strides are those it had when wrapped."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CORE_DEVICE,
            requires_grad=False,
        )
        made.values = values.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from pretend_gpu import operations  # it needs this class

        return operations.run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, for which cuda is where this tensor is already."""
        options = parse_to(args, kwargs)
        if is_cuda(options["device"]):
            options["device"] = None
        return super().to(**options)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def is_pinned(self, *args: Any) -> bool:
        return False

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.Tensor': only dense CPU tensors can be pinned")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: PretendTensor) -> None:
        torch.Tensor.data.__set__(self, new)  # pyright: ignore[reportAttributeAccessIssue]
        self.values = new.values

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = PretendTensor(self.values.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made)
        memo[id(self)] = made
        return made.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a pretended tensor is not pickled: copy it to the host first")

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.values!r}, device='cuda:0')"


def parse_to(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Tensor.to` in all its forms, by name."""
    rest = {name: value for name, value in kwargs.items() if name not in ("copy", "other")}
    other = kwargs.get("other", args[0] if args and isinstance(args[0], Tensor) else None)
    if other is not None:
        args = (other.device, other.dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **rest)  # pyright: ignore
    return {
        "device": device,
        "dtype": dtype,
        "non_blocking": non_blocking,
        "copy": kwargs.get("copy", False),
        "memory_format": layout or torch.preserve_format,
    }


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument means the pretend GPU, as Python or PyTorch's core names it."""
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type in ("cuda", CORE_DEVICE.type)


def values_of(value: Any) -> Any:
    return value.values if isinstance(value, PretendTensor) else value


def on_device(value: Any) -> Any:
    """A CPU tensor as one of the pretend GPU; anything else as it is."""
    is_host = isinstance(value, Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if is_host else value
