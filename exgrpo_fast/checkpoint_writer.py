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
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from exgrpo_fast.checkpoint import CannotSave, Checkpoints, State, merge_tensors, split_tensors
from exgrpo_fast.errors import NumericalStop
from exgrpo_fast.parted import own_part, whole

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
        """`on_committed` hears the step of each checkpoint that has become durable."""
        self.checkpoints = checkpoints
        self.model = model
        self.warn = warn
        self.on_committed = on_committed
        self.committed: int | None = None  # the step of the newest one that is durable
        self.num_failures = 0
        self._failures_in_a_row = 0
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: Exception | None = None

    def save(self, step: int, state: State) -> None:
        """Copy everything to the host and begin to write it. The errors of `wait`."""
        self.wait()
        plain, tensors = split_tensors({"model": self.model.tensors(), "state": state})
        copies = self._copies.take(tensors)
        frozen = merge_tensors(json.loads(json.dumps(plain)), copies)
        self._warn_of_a_full_disk(sum(copy.nbytes for copy in copies.values()))
        self._step = step
        self._thread = threading.Thread(
            target=self._write, args=(frozen,), name="checkpoint", daemon=True
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

    def _write(self, frozen: dict[str, Any]) -> None:
        try:
            _refuse_what_is_not_finite(self._step, frozen)
            model = frozen["model"]
            self.checkpoints.save(
                self._step, lambda folder: self.model.write(folder, model), frozen["state"]
            )
        except Exception as error:  # of the other thread: `wait` raises it in this one
            self._error = error

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
    """Each tensor once with all its names; one in parts is put together, by all processes."""
    names_of: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        own = own_part(tensor)
        place = (own.data_ptr() or name, own.shape, own.stride(), own.dtype, tensor.shape)
        names_of.setdefault(place, []).append(name)
    for names in names_of.values():
        yield names, whole(tensors[names[0]])


def _refuse_what_is_not_finite(step: int, frozen: Mapping[str, Any]) -> None:
    """Weights and moments; what replay keeps may hold infinities of its own."""
    learned = {"model": frozen["model"], "learner": frozen["state"].get("learner", {})}
    for name, tensor in split_tensors(learned)[1].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NumericalStop(
                f"step {step}: {name.removeprefix('state.')} holds a value that is not finite; "
                f"nothing was saved, the last checkpoint is the one before"
            )
