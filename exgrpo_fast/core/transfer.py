"""Tensors between the host and a device, by pinned memory and without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: any dtype may begin there
ARENA_BYTES = 2**30  # of pinned memory, at least; a power of two


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
        size += _aligned_bytes(tensor)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for tensor, start in zip(tensors, starts, strict=True):
        _part(pinned, start, tensor).copy_(tensor)
    moved = pinned.to(device, non_blocking=True)
    return [_part(moved, start, t) for t, start in zip(tensors, starts, strict=True)]


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor as it stays on the CPU, where a later copy to `device` need not be waited for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def pinned_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised pinned CPU tensors of the same shapes and dtypes, in few allocations.

    torch rounds each pinned allocation up to a power of two: one for each weight and moment of a 7B
    model would take 174 GB for 91. First fit, largest first, into arenas of such a size.
    """
    sizes = [_aligned_bytes(tensor) for tensor in tensors]
    arena_bytes = max(ARENA_BYTES, 2 << max(sizes, default=0).bit_length())
    used: list[int] = []
    places: dict[int, tuple[int, int]] = {}  # tensor -> arena, start
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = (a for a, size in enumerate(used) if size + sizes[i] <= arena_bytes)
        arena = next(fits, len(used))
        if arena == len(used):
            used.append(0)
        places[i] = arena, used[arena]
        used[arena] += sizes[i]
    arenas = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in used]
    return [_part(arenas[places[i][0]], places[i][1], t) for i, t in enumerate(tensors)]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a DTensor: all of it


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-_num_bytes(tensor) // ALIGNMENT) * ALIGNMENT


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes from `start` on, with the dtype and shape of another tensor."""
    return buffer[start : start + _num_bytes(like)].view(like.dtype).view(like.shape)


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
