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
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, empty

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.process_group import Processes

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


def write_shards(folder: Path, tensors: Mapping[str, DTensor], processes: Processes) -> None:
    """Every rank writes its shards, which lie on the host, durably. A collective.

    OSError on all ranks where one could not. `dcp.save` would send the plans of all ranks as pickles;
    a shard's place and its file need no other rank's plan, so each rank makes its own.
    """
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), files_of(tensors, processes.count), save_distributed=True
    )
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(dict(tensors))
    refusal = None
    try:
        plan = writer.prepare_local_plan(planner.create_local_plan())
        # The writer numbers the files of a rank by the place of its plan among those of all ranks.
        plan = writer.prepare_global_plan([plan] * processes.count)[processes.place.rank]
        writer.write_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:  # the others wait for what this rank says
        refusal = f"rank {processes.place.rank}: {error}"
    if refusals := [found for found in processes.gather(refusal) if found is not None]:
        raise OSError("; ".join(refusals))


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
        dtype = stored.properties.dtype
        if name in names and mesh is None:
            tensors[name] = torch.empty(stored.size, dtype=dtype)
        elif name in names:  # FSDP2 shards the first dimension
            placed = {"device_mesh": mesh, "placements": [Shard(0)]}
            tensors[name] = empty(stored.size, dtype=dtype, **placed)
    with warnings.catch_warnings(action="ignore"):  # that it reads on its own
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
