"""Checkpoints written beside training, from a copy on the host.

Training waits for the copy alone; the next save and the end of the run wait for the writer. A disk
that refuses ends no run at once: the last good checkpoint stays, and the next interval tries again.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exgrpo_fast.core.dtensor import full_tensor, local_shard
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.run.checkpoint.format import (
    CannotSave,
    Checkpoints,
    State,
    WriteFolder,
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

    def learned(self) -> dict[str, Tensor]:
        """Weights and moments; what replay keeps may hold infinities of its own."""
        return split_tensors({"model": self.model, "learner": self.state.get("learner", {})})[1]

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
        self._model_copies, self._state_copies = HostCopies(), HostCopies()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None

    def save(self, step: int, state: State) -> None:
        """Copy everything to the host and begin to write it. The errors of `wait`."""
        self.wait()
        plain, tensors = split_tensors(state)
        model = self._model_copies.take(self.model.tensors())
        copies = self._state_copies.take(tensors)
        copied = Copied(model, merge_tensors(json.loads(json.dumps(plain)), copies))
        self._warn_of_a_full_disk(copied.num_bytes)
        self._step = step
        self._thread = threading.Thread(
            target=self._write, args=(copied,), name="checkpoint", daemon=True
        )
        self._thread.start()

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
            if name := self._not_finite(copied):
                raise NumericalStop(
                    f"step {self._step}: {name} holds a value that is not finite; "
                    f"nothing was saved, the last checkpoint is the one before"
                )
            self._commit(copied)
        except Exception as error:  # of the other thread: `wait` raises it in this one
            self._error = error

    def _not_finite(self, copied: Copied) -> str | None:
        """The name of a weight or a moment that is not finite, if there is one."""
        for name, tensor in copied.learned().items():
            part = local_shard(tensor)
            if part.is_floating_point() and not part.isfinite().all():
                return name.removeprefix("state.")
        return None

    def _commit(self, copied: Copied, save_parts: WriteFolder | None = None) -> None:
        write_model = partial(self.model.write, tensors=copied.model)
        self.checkpoints.save(self._step, write_model, copied.state, save_parts=save_parts)

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


class HostCopies:
    """Copies of tensors on the host, into the same memory each time; pinned beside a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> copy; the last call's copies are overwritten. Tied weights stay tied."""
        copies: dict[str, Tensor] = {}
        for names, tensor in gathered(tensors):
            copy = self._memory(names[0], tensor).copy_(tensor, non_blocking=True)
            copies |= dict.fromkeys(names, copy)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._kept = copies
        return copies

    def _memory(self, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
            return kept
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def gathered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Each tensor once with all its names; a DTensor is gathered, a collective of all ranks."""
    names_of: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        own = local_shard(tensor)
        place = (own.data_ptr() or name, own.shape, own.stride(), own.dtype, tensor.shape)
        names_of.setdefault(place, []).append(name)
    for names in names_of.values():
        yield names, full_tensor(tensors[names[0]])
