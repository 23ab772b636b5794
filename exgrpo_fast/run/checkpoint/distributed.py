"""Checkpoints of several ranks: rank 0 writes the model, each rank its shards of the state."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from exgrpo_fast.core.dtensor import from_local_shard, local_shard, write_shards
from exgrpo_fast.core.process_group import Processes, mesh_of
from exgrpo_fast.run.checkpoint.format import (
    CannotSave,
    Checkpoints,
    WriteFolder,
    merge_tensors,
    split_tensors,
)
from exgrpo_fast.run.checkpoint.writer import (
    CheckpointWriter,
    Copied,
    HostCopies,
    ModelFolder,
    gathered,
)


class SharedCheckpointWriter(CheckpointWriter):
    """One on every rank. Rank 0 writes the gathered model and the trainer's state; of sharded
    tensors in the state, the optimiser's moments, each rank writes its own shards.

    Rank 0 decides whether a checkpoint is complete. It may repeat one after freeing space on a full
    disk; the other ranks follow what it broadcasts.
    """

    def __init__(
        self, checkpoints: Checkpoints, model: ModelFolder, *, processes: Processes, **settings: Any
    ) -> None:
        """`settings`: those of a CheckpointWriter."""
        super().__init__(checkpoints, model, **settings)
        self.background_group = processes.background_group()
        self._state_copies = ShardCopies(self.background_group)
        if not processes.is_main:
            self._model_copies = GatherOnly()

    def _not_finite(self, copied: Copied) -> str | None:
        names = self.background_group.gather(super()._not_finite(copied))
        return next((name for name in names if name is not None), None)

    def _commit(self, copied: Copied, save_parts: WriteFolder | None = None) -> None:
        state, parts = apart(copied.state)
        if not self.background_group.is_main:
            return self._follow(parts)
        if parts:
            save_parts = partial(self._lead, parts)
        why: str | None = "rank 0 has failed"
        try:
            super()._commit(Copied(copied.model, state), save_parts)
            why = None
        except CannotSave as error:
            why = str(error)
            raise
        finally:
            self.background_group.broadcast({"folder": None, "why": why})

    def _lead(self, parts: Mapping[str, DTensor], folder: Path) -> None:
        self.background_group.broadcast({"folder": str(folder)})
        write_shards(folder, parts, self.background_group.group)

    def _follow(self, parts: Mapping[str, DTensor]) -> None:
        while folder := (told := self.background_group.broadcast(None))["folder"]:
            with contextlib.suppress(OSError):  # rank 0 reports it
                write_shards(Path(folder), parts, self.background_group.group)
        if told["why"] is not None:
            raise CannotSave(told["why"])


def apart(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """(the state with a reference in place of each DTensor, the DTensors by name)."""
    plain, tensors = split_tensors(state)
    parts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    named: dict[str, Any] = {name: {"__tensor__": name} for name in parts}
    return merge_tensors(plain, {**tensors, **named}), parts


class ShardCopies(HostCopies):
    """Copies this rank's shards; on rank 0 also the replicated tensors, which it alone writes."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.mesh = mesh_of(processes)
        self.is_main = processes.is_main

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
        alike = {name: t for name, t in tensors.items() if name not in parts}
        wanted = {name: local_shard(t) for name, t in parts.items()}
        copies = super().take(wanted | alike if self.is_main else wanted)
        in_parts = {name: from_local_shard(t, copies[name], self.mesh) for name, t in parts.items()}
        return alike | copies | in_parts


class GatherOnly(HostCopies):
    """Takes part in the gather and keeps nothing."""

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for _ in gathered(tensors):
            pass
        return {}
