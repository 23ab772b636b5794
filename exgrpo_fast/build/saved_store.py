"""The experience store of a checkpoint: read, pruned into a new checkpoint, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.experience.replay.inspect import (
    SortKey,
    StoredQuestion,
    StoredTrajectory,
    find_question,
    prune,
    stats,
    stored_questions,
    stored_trajectories,
)
from exgrpo_fast.experience.replay.snapshot import FORMAT
from exgrpo_fast.experience.replay.starting_pool import export_pool
from exgrpo_fast.model.folder_reading import load_tokenizer, make_decode
from exgrpo_fast.run.checkpoint.format import load_state, write_checkpoint
from exgrpo_fast.run.checkpoint.manifest import find_checkpoint


@dataclass(frozen=True)
class SavedStore:
    """The snapshot in one checkpoint, which no method changes."""

    checkpoint: Path
    step: int  # steps done
    snapshot: dict[str, Any]

    @staticmethod
    def open(path: Path, on_bad: Callable[[str], None]) -> SavedStore:
        """`path`: a checkpoint, or a run folder, of which the newest one that verifies is read.

        UserError where there is none, or none with experience of the present format.
        """
        checkpoint = find_checkpoint(path, on_bad)
        state = load_state(checkpoint, only=("num_steps", "replay"))
        if not state["replay"]:
            raise UserError(f"{checkpoint}: keeps no experience, its run had no replay")
        snapshot = state["replay"]["store"]
        if snapshot.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint}: its experience store was saved by an early version, in a format "
                f"that this one does not read"
            )
        return SavedStore(checkpoint, state["num_steps"], snapshot)

    @property
    def group_size(self) -> int:
        return self.snapshot["group_size"]

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Token ids -> text, by the tokenizer of the checkpoint."""
        return make_decode(load_tokenizer(str(self.checkpoint / "hf")))

    def stats(self) -> dict[str, Any]:
        return stats(self.snapshot, self.step)

    def questions(
        self, *, sort: SortKey, bucket: int | None, limit: int | None
    ) -> list[StoredQuestion]:
        if bucket is not None and bucket > self.group_size:
            raise UserError(f"--bucket {bucket}: the buckets are 0 to {self.group_size}")
        return stored_questions(self.snapshot, sort=sort, bucket=bucket, limit=limit)

    def question(self, question_id: str) -> tuple[StoredQuestion, list[StoredTrajectory]]:
        """UserError, with the closest id, where the snapshot does not name it."""
        question = find_question(self.snapshot, question_id)
        return question, stored_trajectories(self.snapshot, question_id)

    def write_pruned(
        self, out: Path, *, max_age: int | None, max_per_question: int | None
    ) -> tuple[int, int]:
        """Write the checkpoint to `out` with fewer trajectories; (how many stay, how many not)."""
        self._refuse_inside(out)
        smaller, dropped = prune(
            self.snapshot, step=self.step, max_age=max_age, max_per_question=max_per_question
        )
        state = load_state(self.checkpoint)
        state["replay"]["store"] = smaller

        def copy_model(hf: Path) -> None:
            shutil.copytree(self.checkpoint / "hf", hf)

        try:
            write_checkpoint(out, self.step, copy_model, state)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--out {out}: {reason(error)}") from None
        return len(smaller["lengths"]), dropped

    def export(self, out: Path) -> int:
        """Write a parquet file for `replay.store.pool`; the number of trajectories."""
        self._refuse_inside(out)
        try:
            return export_pool(self.snapshot, out, self.decoder())
        except OSError as error:
            raise UserError(f"--out {out}: {reason(error)}") from None

    def _refuse_inside(self, out: Path) -> None:
        """With a file more the checkpoint would no longer verify."""
        if out.absolute().is_relative_to(self.checkpoint.absolute()):
            raise UserError(f"--out {out}: is inside the checkpoint that it is made from")


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
