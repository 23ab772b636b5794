"""Checkpoints of several processes, and what those beside the first do while that one writes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from exgrpo_fast.core.dtensor import own_part, with_part, write_parts
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
    """Every process has one. The first writes the model, put together, and the trainer's state;
    what the state has in parts, the optimiser's moments, each copies and writes itself.

    The first decides whether a checkpoint came to be. It may write one again, after making room on
    a full disk; the others do as they hear.
    """

    def __init__(
        self, checkpoints: Checkpoints, model: ModelFolder, *, processes: Processes, **settings: Any
    ) -> None:
        """`settings`: those of a CheckpointWriter."""
        super().__init__(checkpoints, model, **settings)
        self.beside = processes.beside()
        self._state_copies = CopiesInParts(self.beside)
        if not processes.is_first:
            self._model_copies = NoCopies()

    def _not_finite(self, copied: Copied) -> str | None:
        names = self.beside.gather(super()._not_finite(copied))
        return next((name for name in names if name is not None), None)

    def _commit(self, copied: Copied, save_parts: WriteFolder | None = None) -> None:
        state, parts = apart(copied.state)
        if not self.beside.is_first:
            return self._follow(parts)
        if parts:
            save_parts = partial(self._lead, parts)
        why: str | None = "the first process has failed"
        try:
            super()._commit(Copied(copied.model, state), save_parts)
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


def apart(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """A state without its tensors in parts, which it names; and those."""
    plain, tensors = split_tensors(state)
    parts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    named: dict[str, Any] = {name: {"__tensor__": name} for name in parts}
    return merge_tensors(plain, {**tensors, **named}), parts


class CopiesInParts(HostCopies):
    """Each process copies its parts, the first also what all have alike, of which the others
    write nothing."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.mesh = mesh_of(processes)
        self.is_first = processes.is_first

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
        alike = {name: t for name, t in tensors.items() if name not in parts}
        wanted = {name: own_part(t) for name, t in parts.items()}
        copies = super().take(wanted | alike if self.is_first else wanted)
        in_parts = {name: with_part(t, copies[name], self.mesh) for name, t in parts.items()}
        return alike | copies | in_parts


class NoCopies(HostCopies):
    """Takes part in putting the tensors together, and keeps none."""

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for _ in gathered(tensors):
            pass
        return {}
