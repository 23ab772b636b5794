"""What `exgrpo-fast buffer` does: a look inside the experience of a run, and ways to reuse it.

PATH is a run folder, of which the newest checkpoint that verifies is taken, or a checkpoint folder.
None of these commands changes it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from exgrpo_fast.config import load_config
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.data import CheckedRow, check_data
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
from exgrpo_fast.experience.replay.pool import export_pool
from exgrpo_fast.experience.replay.snapshot import FORMAT
from exgrpo_fast.run.checkpoint.format import find_checkpoint, load_state, write_checkpoint

BAR_WIDTH = 40  # characters, of the longest bar


def stats_session(path: Path, *, as_json: bool) -> None:
    saved = open_store(path)
    found = stats(saved.snapshot, saved.step)
    print(json.dumps(found, indent=2) if as_json else stats_text(saved.checkpoint, found))


def list_session(path: Path, *, sort: SortKey, bucket: int | None, limit: int | None) -> None:
    snapshot = open_store(path).snapshot
    group_size = snapshot["group_size"]
    if bucket is not None and bucket > group_size:
        raise UserError(f"--bucket {bucket}: the buckets are 0 to {group_size}")
    found = stored_questions(snapshot, sort=sort, bucket=bucket, limit=limit)
    print(questions_text(found, group_size))


def show_session(path: Path, question_id: str) -> None:
    saved = open_store(path)
    question = find_question(saved.snapshot, question_id)
    found = stored_trajectories(saved.snapshot, question_id)
    print(question_text(question, saved.snapshot["group_size"]))
    if row := training_row(saved.checkpoint, question_id):
        print(clean_text(f"\n{prompt_text(row)}\nanswer    {row.answer}"))
    decode = saved.decoder() if found else str
    for trajectory in found:
        print(f"\n--- {trajectory_text(trajectory)}")
        print(clean_text(decode(trajectory.token_ids)))


def prune_session(
    path: Path, out: Path, *, max_age: int | None, max_per_question: int | None
) -> None:
    """Write the checkpoint anew, with a smaller store."""
    saved = open_store(path)
    require_outside(out, saved.checkpoint)
    smaller, dropped = prune(
        saved.snapshot, step=saved.step, max_age=max_age, max_per_question=max_per_question
    )
    state = load_state(saved.checkpoint)
    state["replay"]["store"] = smaller

    def copy_model(hf: Path) -> None:
        shutil.copytree(saved.checkpoint / "hf", hf)

    try:
        write_checkpoint(out, saved.step, copy_model, state)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: {reason(error)}") from None
    print(f"{out}: {len(smaller['lengths'])} trajectories stay, {dropped} were dropped")


def export_session(path: Path, out: Path) -> None:
    """Write the trajectories as a file for `replay.store.pool` and for data tools."""
    saved = open_store(path)
    require_outside(out, saved.checkpoint)
    try:
        count = export_pool(saved.snapshot, out, saved.decoder())
    except OSError as error:
        raise UserError(f"--out {out}: {reason(error)}") from None
    print(f"{out}: {count} trajectories")


# --- what is read ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedStore:
    """The experience that lies in one checkpoint."""

    checkpoint: Path
    step: int  # steps done
    snapshot: dict[str, Any]

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Token ids -> text, by the tokenizer that the checkpoint holds."""
        from exgrpo_fast.build.models import load_tokenizer, make_decode

        return make_decode(load_tokenizer(str(self.checkpoint / "hf")))


def open_store(path: Path) -> SavedStore:
    """UserError where there is no whole checkpoint, or none with experience that can be read."""
    checkpoint = newest_checkpoint(path)
    state = load_state(checkpoint, only=("num_steps", "replay"))
    if not state["replay"]:
        raise UserError(f"{checkpoint}: keeps no experience, its run had no replay")
    snapshot = state["replay"]["store"]
    if snapshot.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint}: its experience store was saved by an early version, in a format that "
            f"this one does not read"
        )
    return SavedStore(checkpoint, state["num_steps"], snapshot)


def newest_checkpoint(path: Path) -> Path:
    return find_checkpoint(
        path, lambda why: print(f"checkpoint passed over: {clean_line(why)}", file=sys.stderr)
    )


def training_row(checkpoint: Path, question_id: str) -> CheckedRow | None:
    """The question's row, where config and data of the run are still on this machine."""
    try:
        data = load_config(str(checkpoint.absolute().parents[1] / "config.yaml")).data
        if data.train is None or (isinstance(data.train, str) and not Path(data.train).exists()):
            return None
        report = check_data(
            data.train if isinstance(data.train, str) else data.train.model_dump(),
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            id_field=data.id_field,
        )
    except UserError:
        return None
    return next((row for row in report.rows if row.id == question_id), None)


def require_outside(out: Path, checkpoint: Path) -> None:
    """A file more, and the checkpoint would no longer verify."""
    if out.absolute().is_relative_to(checkpoint.absolute()):
        raise UserError(f"--out {out}: lies inside the checkpoint that it is made from")


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# --- what is shown --------------------------------------------------------------------------------


def stats_text(checkpoint: Path, found: Mapping[str, Any]) -> str:
    size = found["group_size"]
    buckets = {f"{bucket}/{size}": count for bucket, count in found["buckets"].items()}
    parts = [
        f"{checkpoint}, after step {found['step']}",
        aligned(
            ("questions stored", f"{found['questions']:,}"),
            ("questions retired", f"{found['retired']:,}"),
            ("trajectories", f"{found['trajectories']:,}"),
            ("never scored", f"{found['never_scored']:,}"),
            ("evicted", f"{found['evicted']:,}"),
            ("tokens", f"{found['tokens']:,}"),
            ("bytes of tokens and log-probs", f"{found['bytes']:,}"),
        ),
        aligned(
            ("", "mean", "min", "max"),
            *(
                (name, *(number(found[key][what]) for what in ("mean", "min", "max")))
                for name, key in MEASURED.items()
                if found[key]
            ),
        ),
        histogram("questions by bucket", buckets),
        histogram("trajectories by age, in steps", found["ages"]),
    ]
    return "\n\n".join(part for part in parts if part)


MEASURED = {
    "trajectories of a question": "trajectories_per_question",
    "age, in steps": "age",
    "length, in tokens": "length",
    "last known entropy, in nats": "entropy",
}


def histogram(title: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    most = max(counts.values())
    names, width = max(map(len, counts)), len(f"{most:,}")
    bars = [
        f"  {name:>{names}}  {count:>{width},}  {'#' * -(-count * BAR_WIDTH // most)}"
        for name, count in counts.items()
    ]
    return "\n".join([title, *bars])


def questions_text(found: Sequence[StoredQuestion], group_size: int) -> str:
    header = "question|bucket|visits|last visit|trajectories|lowest entropy|newest birth".split("|")
    rows = [
        (
            clean_line(question.id),
            bucket_name(question.bucket, group_size),
            str(question.visits),
            str(question.last_visit),
            str(question.trajectories),
            number(question.lowest_entropy),
            number(question.newest),
        )
        for question in found
    ]
    return aligned(header, *rows)


def question_text(question: StoredQuestion, group_size: int) -> str:
    bucket = bucket_name(question.bucket, group_size)
    state = f"bucket {bucket}" if question.bucket >= 0 else "in no bucket"
    state = "retired" if question.retired else state
    visited = f", the last in step {question.last_visit}" if question.visits else ""
    return (
        f"question  {clean_line(question.id)}\n"
        f"          {state}, visits: {question.visits}{visited}, "
        f"trajectories: {question.trajectories}"
    )


def trajectory_text(trajectory: StoredTrajectory) -> str:
    entropy = trajectory.entropy
    parts = [
        f"reward {trajectory.reward:g}",
        f"{len(trajectory.token_ids)} tokens{' (cut)' if trajectory.truncated else ''}",
        f"born in step {trajectory.birth_step}",
        "never scored" if entropy is None else f"entropy {entropy:.3f}",
        f"mean log-prob {trajectory.mean_logprob:.3f}",
    ]
    return ", ".join(parts)


def prompt_text(row: CheckedRow) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n".join(str(message.get("content", "")) for message in row.prompt)


def bucket_name(bucket: int, group_size: int) -> str:
    return f"{bucket}/{group_size}" if bucket >= 0 else "-"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def aligned(*rows: Sequence[str]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
