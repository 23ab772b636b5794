"""`exgrpo-fast buffer`: look into the experience store of a run, prune it, export it; import others.

PATH is a run folder, of which the newest checkpoint that verifies is taken, or a checkpoint folder.
No action changes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exgrpo_fast.cli.arguments import (
    add_command,
    add_fields,
    choose_device,
    looks_local,
    natural,
    positive,
    require_absent,
    require_file,
)
from exgrpo_fast.cli.eval import with_limits
from exgrpo_fast.config import ConfigError, load_config
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.data import CheckedRow, check_data

if TYPE_CHECKING:
    from exgrpo_fast.build.saved_store import SavedStore
    from exgrpo_fast.experience.replay.inspect import StoredQuestion, StoredTrajectory

BAR_WIDTH = 40  # characters, of the longest bar
SORT_KEYS = ("bucket", "trajectories", "visits", "entropy", "age")  # of `buffer ls`


def add_buffer(commands: Any) -> None:
    text = "the replay buffer of a run: look inside, make it smaller, export it"
    buffer = commands.add_parser("buffer", help=text, description=text, allow_abbrev=False)
    actions = buffer.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = add_command(actions, name, run, text)
        made.add_argument("path", help="a run folder (its newest checkpoint), or a checkpoint")
        return made

    a = action("stats", buffer_stats, "how much is stored, how old and how hard it is")
    a.add_argument("--json", action="store_true", help="the same as JSON")

    text = (
        "the stored questions, one a line: last = step of the last visit, stored = trajectories, "
        "entropy = the lowest of them, born = step of the newest"
    )
    a = action("ls", buffer_ls, text)
    a.add_argument(
        "--sort", metavar="KEY", choices=SORT_KEYS, default="bucket", help=" | ".join(SORT_KEYS)
    )
    a.add_argument("--bucket", type=natural, help="only the questions of this bucket")
    a.add_argument("--limit", type=positive, help="only the first so many")

    a = action("show", buffer_show, "a question and its stored trajectories")
    a.add_argument("id", metavar="ID", help="of a question, as `ls` prints it")

    a = action("prune", buffer_prune, "write the checkpoint anew, with fewer trajectories")
    a.add_argument("--max-age", metavar="N", type=natural, help="drop those born more steps ago")
    a.add_argument(
        "--max-per-question",
        metavar="N",
        type=positive,
        help="keep so many, those of the lowest entropy",
    )
    a.add_argument("--out", required=True, help="new, such as runs/NEW/checkpoints/step_80")

    a = action("export", buffer_export, "trajectories as a parquet file for replay.store.pool")
    a.add_argument("--out", required=True, help="a new .parquet file")

    text = "completions of other runs and trainers as a parquet file for replay.store.pool"
    a = add_command(actions, "import", buffer_import, text)
    a.add_argument("files", nargs="+", metavar="FILE", help="completions: .parquet or .jsonl")
    a.add_argument("--out", required=True, help="a new .parquet file")
    name = "whose tokenizer the run will have; scores what has no log-probs"
    a.add_argument("--model", dest="model.name", required=True, help=name)
    a.add_argument(
        "--data", dest="data.train", metavar="FILE", required=True, help="the questions of the run"
    )
    add_fields(a, "data.")
    a.add_argument("--id-field", dest="data.id_field", help="as data.id_field of the run")
    a.add_argument(
        "--max-completion-tokens",
        dest="rollout.max_completion_tokens",
        metavar="N",
        type=positive,
        default=2048,
        help="longer ones are left out (2048)",
    )
    a.add_argument(
        "--correct-from",
        metavar="REWARD",
        type=float,
        help="reward of a correct completion (1 for each reward function)",
    )
    a.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")


def open_store(path: str) -> SavedStore:
    if not any((Path(path) / name).exists() for name in ("checkpoints", "MANIFEST.json")):
        raise ConfigError(f"{path}: neither a run folder nor a checkpoint")
    from exgrpo_fast.build.saved_store import SavedStore

    return SavedStore.open(
        Path(path), lambda why: print(f"checkpoint passed over: {clean_line(why)}", file=sys.stderr)
    )


def buffer_stats(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer stats")
    saved = open_store(arguments.path)
    found = saved.stats()
    print(json.dumps(found, indent=2) if arguments.json else stats_text(saved.checkpoint, found))
    return 0


def buffer_ls(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer ls")
    saved = open_store(arguments.path)
    found = saved.questions(sort=arguments.sort, bucket=arguments.bucket, limit=arguments.limit)
    print(questions_text(found, saved.group_size))
    return 0


def buffer_show(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer show")
    saved = open_store(arguments.path)
    question, trajectories = saved.question(arguments.id)
    print(question_text(question, saved.group_size))
    if row := training_row(saved.checkpoint, question.id):
        print(clean_text(f"\n{prompt_text(row)}\nanswer    {row.answer}"))
    decode = saved.decoder() if trajectories else str
    for trajectory in trajectories:
        print(f"\n--- {trajectory_text(trajectory)}")
        print(clean_text(decode(trajectory.token_ids)))
    return 0


def buffer_prune(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer prune")
    require_absent(arguments.out)
    limits = {"max_age": arguments.max_age, "max_per_question": arguments.max_per_question}
    if not any(limit is not None for limit in limits.values()):
        raise ConfigError("buffer prune: give --max-age STEPS, --max-per-question N or both")
    kept, dropped = open_store(arguments.path).write_pruned(Path(arguments.out), **limits)
    print(f"{arguments.out}: {kept} trajectories stay, {dropped} were dropped")
    return 0


def buffer_export(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer export")
    require_absent(arguments.out)
    count = open_store(arguments.path).export(Path(arguments.out))
    print(f"{arguments.out}: {count} trajectories")
    return 0


def buffer_import(arguments: argparse.Namespace) -> int:
    require_absent(arguments.out)
    values = {key: value for key, value in vars(arguments).items() if "." in key}
    for file in arguments.files:
        require_file(file, "buffer import")
    require_file(values["data.train"], "--data")
    if looks_local(values["model.name"]):
        require_file(values["model.name"], "--model")
    config = with_limits(values)
    device = choose_device(arguments.device)
    from exgrpo_fast.build.past_rollouts import import_rollouts

    out, correct_from = Path(arguments.out), arguments.correct_from
    found = import_rollouts(arguments.files, out, config, correct_from=correct_from, device=device)
    print(f"{arguments.out}: {found}")
    return 0


def training_row(checkpoint: Path, question_id: str) -> CheckedRow | None:
    """The question's row; None where config or data of the run are not on this machine."""
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
    """A row a question: bucket, visits, step of the last visit, stored trajectories, the lowest
    entropy and the newest step of birth among them."""
    header = "question bucket visits last stored entropy born".split()
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
