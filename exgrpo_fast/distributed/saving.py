"""What the processes beside the first do while that one writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.bad_batches import BadBatches
from exgrpo_fast.checkpoint import State, split_tensors
from exgrpo_fast.checkpoint_writer import CheckpointWriter, gathered
from exgrpo_fast.metrics import CompletionLog


class CheckpointFollower(CheckpointWriter):
    """Takes part in putting the tensors of a checkpoint together, and writes nothing."""

    def save(self, step: int, state: State) -> None:
        _, tensors = split_tensors({"model": self.model.tensors(), "state": state})
        for _ in gathered(tensors):
            pass
        self.committed = step


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
