"""Tensors in parts, of which each process holds its own: together, apart."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor in parts put together, on every process, which all have to take part in."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """A tensor in parts put together, to be reckoned with beside others in parts."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parted_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every process, in parts where `other` is; nothing is sent."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    moved = tensor.to(other.device)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)
