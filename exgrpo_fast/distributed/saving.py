"""Checkpoints of several processes, and what those beside the first do while that one writes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from exgrpo_fast.bad_batches import BadBatches
from exgrpo_fast.checkpoint import CannotSave, Checkpoints, apart
from exgrpo_fast.checkpoint_writer import (
    CheckpointWriter,
    Copied,
    HostCopies,
    ModelFolder,
    gathered,
)
from exgrpo_fast.metrics import CompletionLog
from exgrpo_fast.parted import own_part, with_part, write_parts
from exgrpo_fast.processes import Processes


class SharedCheckpointWriter(CheckpointWriter):
    """The first process writes the model, put together, and the trainer's state; what the state
    has in parts, the optimiser's moments, each process copies and writes itself.

    Whether a checkpoint came to be the first one decides, which may write it a second time after
    making room on a full disk; the others do as they hear.
    """

    def __init__(
        self, checkpoints: Checkpoints, model: ModelFolder, *, processes: Processes, **said: Any
    ) -> None:
        """All processes have to; `said`: `warn` and `on_committed` of a CheckpointWriter."""
        super().__init__(checkpoints, model, **said)
        self.beside = processes.beside()
        self._state_copies = HostCopiesInParts(self.beside)
        if not processes.is_first:
            self._model_copies = NoCopies()

    def _not_finite(self, copied: Copied) -> str | None:
        names = self.beside.gather(super()._not_finite(copied))
        return next((name for name in names if name is not None), None)

    def _commit(self, copied: Copied) -> None:
        state, parts = apart(copied.state)
        if not self.beside.is_first:
            return self._follow(parts)
        why: str | None = "the first process has failed"
        try:
            self.checkpoints.save(
                self._step,
                partial(self.model.write, tensors=copied.model),
                state,
                save_parts=partial(self._lead, parts) if parts else None,
            )
            why = None
        except CannotSave as error:
            why = str(error)
            raise
        finally:
            self.beside.of_first({"folder": None, "why": why})

    def _lead(self, parts: Mapping[str, DTensor], folder: Path) -> None:
        self.beside.of_first({"folder": str(folder)})
        write_parts(folder, parts, self.beside.group)

    def _follow(self, parts: Mapping[str, DTensor]) -> None:
        while folder := (told := self.beside.of_first(None))["folder"]:
            with contextlib.suppress(OSError):  # the first process has it, too
                write_parts(Path(folder), parts, self.beside.group)
        if told["why"] is not None:
            raise CannotSave(told["why"])


class HostCopiesInParts(HostCopies):
    """What is in parts stays so; each process keeps its own."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.mesh = DeviceMesh("cpu", range(processes.count))

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = super().take({name: own_part(tensor) for name, tensor in tensors.items()})
        return {
            name: with_part(tensor, copies[name], self.mesh)
            if isinstance(tensor, DTensor)
            else copies[name]
            for name, tensor in tensors.items()
        }


class NoCopies(HostCopies):
    """Takes part in putting the tensors together, and keeps none."""

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for _ in gathered(tensors):
            pass
        return {}


class NoCompletionLog(CompletionLog):
    """The first process has the same rows and writes them."""

    def __init__(self) -> None:
        super().__init__(Path())

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass


class NoBadBatches(BadBatches):
    """The first process has the same batch and keeps it."""

    def __init__(self) -> None:
        super().__init__(Path())

    def write(self, step: int, refused: Sequence[Any]) -> None:
        pass
