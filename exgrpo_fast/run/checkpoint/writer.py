"""Checkpoints written by a background thread, from a copy on the host.

Training waits for the copy alone; the next save and the end of the run wait for the writer. A disk
that refuses ends no run at once: the last good checkpoint stays, and the next interval tries again.

With several ranks, rank 0 writes the gathered model and the trainer's state; of sharded tensors in the
state, the optimiser's moments, each rank writes its own shards. Rank 0 decides whether a checkpoint is
complete. It may repeat one after freeing space on a full disk; the others follow what it broadcasts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from exgrpo_fast.core.dtensor import from_local_shard, full_tensor, local_shard, write_shards
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes, host_mesh
from exgrpo_fast.core.transfer import pinned_like
from exgrpo_fast.run.checkpoint.format import (
    CannotSave,
    Checkpoints,
    State,
    merge_tensors,
    split_tensors,
)

MAX_FAILED_SAVES = 3  # in a row, before the run ends

log = logging.getLogger(__name__)


class ModelFolder(Protocol):
    """A model as the files of a checkpoint's hf/ folder."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights, on their device, not copied."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write `tensors` and what else a loader needs; called from another thread."""
        ...


class Copied(NamedTuple):
    """A checkpoint on the host, before it is written."""

    model: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        tensors = [*self.model.values(), *split_tensors(self.state)[1].values()]
        return sum(tensor.nbytes for tensor in tensors)


class CheckpointWriter:
    """Saves into `checkpoints`, one at a time; its errors reach the caller at the next call."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: ModelFolder,
        *,
        processes: Processes = SINGLE_PROCESS,
        warn: Callable[[str], None] = log.warning,
        on_committed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`on_committed` is called with the step of each checkpoint that is durable."""
        self.checkpoints = checkpoints
        self.model = model
        self.warn = warn
        self.on_committed = on_committed
        self.committed: int | None = None  # the step of the newest one that is durable
        self.num_failures = 0
        self._failures_in_a_row = 0
        self._group = processes.background_group()  # training uses the other one meanwhile
        self._mesh = host_mesh(self._group)
        self._model_copies, self._state_copies = HostCopies(keep=processes.is_main), HostCopies()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None

    def save(self, step: int, state: State) -> None:
        """Copy everything to the host and begin to write it. The errors of `wait`."""
        self.wait()
        plain, tensors = split_tensors(state)
        model = self._model_copies.take(self.model.tensors())
        copies = self._copy_state(tensors)
        copied = Copied(model, merge_tensors(json.loads(json.dumps(plain)), copies))
        self._warn_of_a_full_disk(copied.num_bytes)
        self._step = step
        self._thread = threading.Thread(
            target=self._write, args=(copied,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _copy_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards; on rank 0 also the replicated tensors, which it alone writes."""
        shards = {name: t for name, t in tensors.items() if isinstance(t, DTensor)}
        replicated = {name: t for name, t in tensors.items() if name not in shards}
        local = {name: local_shard(tensor) for name, tensor in shards.items()}
        copies = self._state_copies.take(local | replicated if self._group.is_main else local)
        if self._mesh is None:
            return copies
        sharded = {n: from_local_shard(t, copies[n], self._mesh) for n, t in shards.items()}
        return replicated | copies | sharded

    def join(self) -> None:
        """Let what is being written come to its end; an error of it stays for `wait`."""
        if self._thread:
            self._thread.join()

    def poll(self) -> None:
        """Take note of a writer that has ended, without waiting for it. The errors of `wait`."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        NumericalStop when a weight or a moment was not finite, CannotSave after `MAX_FAILED_SAVES`
        refusals of the disk in a row.
        """
        error = self._outcome()
        if error is None:
            return
        if self._failures_in_a_row >= MAX_FAILED_SAVES:
            raise error
        log.error("%s", error)
        self.warn(f"NOT SAVED: {error}; the run goes on and tries again at the next interval")

    def finish(self, step: int, state: State) -> Path:
        """Save and wait: the last checkpoint of a run. CannotSave at the first refusal."""
        self.save(step, state)
        if error := self._outcome():
            raise error
        return self.checkpoints.folder / f"step_{step}"

    def _outcome(self) -> CannotSave | None:
        """Waits; what the disk said to the save that was under way, if it refused."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            self._failures_in_a_row = 0
            self.committed = self._step
            self.on_committed(self._step)
            return None
        if not isinstance(error, CannotSave):
            raise error
        self.num_failures += 1
        self._failures_in_a_row += 1
        return error

    def _write(self, copied: Copied) -> None:
        try:
            # Weights and moments alone: the replay store may hold infinities.
            learned = {"model": copied.model, "learner": copied.state.get("learner", {})}
            names = self._group.gather(first_not_finite(split_tensors(learned)[1]))
            if name := next(filter(None, names), None):
                raise NumericalStop(
                    f"step {self._step}: {name} holds a value that is not finite; "
                    f"nothing was saved, the last checkpoint is the one before"
                )
            self._commit(copied)
        except Exception as error:  # of the other thread: `wait` raises it in this one
            self._error = error

    def _commit(self, copied: Copied) -> None:
        state, shards = separate_shards(copied.state)
        if not self._group.is_main:
            return self._follow(shards)
        write_model = partial(self.model.write, tensors=copied.model)
        write_parts = partial(self._lead, shards) if shards else None
        why: str | None = "rank 0 has failed"
        try:
            self.checkpoints.save(self._step, write_model, state, save_parts=write_parts)
            why = None
        except CannotSave as error:
            why = str(error)
            raise
        finally:
            self._group.broadcast({"folder": None, "why": why})

    def _lead(self, shards: Mapping[str, DTensor], folder: Path) -> None:
        self._group.broadcast({"folder": str(folder)})
        write_shards(folder, shards, self._group)

    def _follow(self, shards: Mapping[str, DTensor]) -> None:
        while folder := (command := self._group.broadcast(None))["folder"]:
            with contextlib.suppress(OSError):  # rank 0 reports it
                write_shards(Path(folder), shards, self._group)
        if command["why"] is not None:
            raise CannotSave(command["why"])

    def _warn_of_a_full_disk(self, num_bytes: int) -> None:
        folder = self.checkpoints.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError:
            return  # the save itself says more
        if free < 2 * num_bytes:
            self.warn(
                f"the disk is nearly full: {free / 2**30:.2f} GiB free at {folder}, and a "
                f"checkpoint takes {num_bytes / 2**30:.2f} GiB"
            )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor whose shard on this rank is not finite."""
    for name, tensor in tensors.items():
        shard = local_shard(tensor)
        if shard.is_floating_point() and not shard.isfinite().all():
            return name.removeprefix("state.")
    return None


def separate_shards(state: Any) -> tuple[Any, dict[str, DTensor]]:
    """(the state with a reference in place of each DTensor, the DTensors by name)."""
    plain, tensors = split_tensors(state)
    shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    references: dict[str, Any] = {name: {"__tensor__": name} for name in shards}
    return merge_tensors(plain, {**tensors, **references}), shards


class HostCopies:
    """Copies of tensors on the host, into the same memory each time; pinned beside a GPU.

    `keep` False: take part in the gather and keep nothing.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._kept: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> copy; the last call's copies are overwritten. Tied weights stay tied."""
        copies: dict[str, Tensor] = {}
        names_of = tied_names(tensors)
        memory: dict[str, Tensor] = {}
        if self.keep:
            memory = self._memory({names[0]: tensors[names[0]] for names in names_of})
        for names in names_of:
            tensor = full_tensor(tensors[names[0]])  # of a DTensor: a collective of all ranks
            if not self.keep:
                continue
            copy = memory[names[0]].copy_(tensor, non_blocking=True)
            copies |= dict.fromkeys(names, copy)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._kept = copies
        return copies

    def _memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """That of the last call where shapes and dtypes are the same."""
        found = {
            name: self._kept[name]
            for name, tensor in tensors.items()
            if name in self._kept
            and (self._kept[name].shape, self._kept[name].dtype) == (tensor.shape, tensor.dtype)
        }
        new = {name: tensor for name, tensor in tensors.items() if name not in found}
        pinned = [name for name, tensor in new.items() if tensor.is_cuda]
        found |= zip(pinned, pinned_like([new[name] for name in pinned]), strict=True)
        host = {name: t for name, t in new.items() if not t.is_cuda}
        return found | {n: torch.empty(t.shape, dtype=t.dtype) for n, t in host.items()}


def tied_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor, once for all that share its memory."""
    names_of: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        own = local_shard(tensor)
        place = (own.data_ptr() or name, own.shape, own.stride(), own.dtype, tensor.shape)
        names_of.setdefault(place, []).append(name)
    return list(names_of.values())
