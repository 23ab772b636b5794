"""DTensor helpers: gather, shard, save and load with torch.distributed.checkpoint.

Every rank writes safetensors files of its shards; any number of ranks can read them, each only what
its own shards need.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    empty,
)

from exgrpo_fast.core.heartbeat import HEARTBEAT

FILE_BYTES = 2**30  # a rank begins its next file at about this size


def full_tensor(tensor: Tensor) -> Tensor:
    """The gathered tensor on every rank; a plain tensor as it is. A collective: all ranks call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with HEARTBEAT.waiting():
        return tensor.full_tensor()


def replicated(tensor: Tensor) -> Tensor:
    """As a replicated DTensor, so that it can be an operand beside sharded ones."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def local_shard(tensor: Tensor) -> Tensor:
    """The shard that this rank holds; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_over_ranks(norm: Tensor, like: Tensor) -> Tensor:
    """The 2-norm of tensors that are sharded as `like` is, from `norm`, that of this rank's shards.

    A collective where `like` is sharded; otherwise `norm` as it is.
    """
    if not isinstance(like, DTensor):
        return norm
    squares = DTensor.from_local(norm.double().square(), like.device_mesh, [Partial()])
    return full_tensor(squares).sqrt().to(norm.dtype)


def from_local_shard(tensor: DTensor, part: Tensor, mesh: DeviceMesh) -> DTensor:
    """The same tensor, of which this process holds `part`; `mesh`: the processes, on its device."""
    return DTensor.from_local(
        part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """In parts where `other` is, on its device: a whole tensor, the same on every process, or one
    that was read in parts. Nothing is sent."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    if isinstance(tensor, DTensor):
        assert tensor.placements == other.placements
        return from_local_shard(tensor, local_shard(tensor).to(other.device), other.device_mesh)
    moved = tensor.to(other.device)
    return distribute_tensor(moved, other.device_mesh, other.placements, src_data_rank=None)


# --- files ----------------------------------------------------------------------------------------


def write_shards(
    folder: Path, tensors: Mapping[str, DTensor], group: dist.ProcessGroup | None
) -> None:
    """Every process of `group` (gloo) writes its parts, which lie on the host, durably.

    OSError in all of them where one could not.
    """
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), files_of(tensors, dist.get_world_size(group)), save_distributed=True
    )
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = (f"process {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        raise OSError("; ".join(causes)) from None


def files_of(tensors: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """name -> which file of a process, from 1. torch puts a file together in memory, so none is
    to be much larger than `FILE_BYTES`."""
    files, before = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + before // (FILE_BYTES * count)
        before += tensor.nbytes
    return files


def read_shards(
    folder: Path, names: Collection[str], mesh: DeviceMesh | None = None
) -> dict[str, Tensor]:
    """name -> the tensor on the host: gathered, or sharded over `mesh`.

    Each process reads on its own, however many wrote. `names` that are not there are left out.
    """
    reader: Any = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        if name in names:
            tensors[name] = _room_for(stored, mesh)
    with warnings.catch_warnings(action="ignore"):  # that it reads on its own
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _room_for(stored: TensorStorageMetadata, mesh: DeviceMesh | None) -> Tensor:
    """FSDP2 parts the first dimension of everything."""
    dtype = stored.properties.dtype
    if mesh is None:
        return torch.empty(stored.size, dtype=dtype)
    return empty(stored.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
