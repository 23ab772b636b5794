"""Tensors from the host to a device, without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: any dtype may begin there


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """CPU tensors on `device`, in one copy from pinned memory where that is a CUDA device.

    A copy from memory that is not pinned waits for the device, and so many small ones cost more
    than one.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for tensor, start in zip(tensors, starts, strict=True):
        _part(pinned, start, tensor).copy_(tensor)
    moved = pinned.to(device, non_blocking=True)
    return [_part(moved, start, t) for t, start in zip(tensors, starts, strict=True)]


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor as it stays on the CPU, where a later copy to `device` need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on, with the dtype and shape of another tensor."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


class HostRead:
    """Figures of a device on their way to the host: `values` waits, unless they are there by then."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """`tensors`: of one dtype and device; their elements are read end to end."""
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
        self._arrived = None
        self._host = joined
        if joined.is_cuda:
            self._host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
            self._host.copy_(joined, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> Tensor:
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        return self._host
