"""`exgrpo-fast buffer`: the experience of a run, looked at, made smaller, exported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.inputs import require_absent, require_file
from exgrpo_fast.cli.parsing import add_command, natural, positive
from exgrpo_fast.config import ConfigError

SORT_KEYS = ("bucket", "trajectories", "visits", "entropy", "age")  # of `buffer ls`


def add_buffer(commands: Any) -> None:
    text = "the experience of a run: look inside, make it smaller, export it"
    buffer = commands.add_parser("buffer", help=text, description=text, allow_abbrev=False)
    actions = buffer.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = add_command(actions, name, run, text)
        made.add_argument("path", help="a run folder (its newest checkpoint), or a checkpoint")
        return made

    a = action("stats", buffer_stats, "how much is stored, how old and how hard it is")
    a.add_argument("--json", action="store_true")

    a = action("ls", buffer_ls, "the stored questions, one a line")
    a.add_argument("--sort", choices=SORT_KEYS, default="bucket", help=f"{' | '.join(SORT_KEYS)}")
    a.add_argument("--bucket", type=natural, help="only the questions of this bucket")
    a.add_argument("--limit", type=positive, help="only the first so many")

    a = action("show", buffer_show, "a question and its stored trajectories")
    a.add_argument("id")

    a = action("prune", buffer_prune, "write the checkpoint anew, with fewer trajectories")
    a.add_argument("--max-age", type=natural, help="drop those born more steps ago")
    a.add_argument("--max-per-question", type=positive, help="drop the highest entropies above it")
    a.add_argument("--out", required=True, help="new, such as runs/NEW/checkpoints/step_80")

    a = action("export", buffer_export, "trajectories as a parquet file for replay.store.pool")
    a.add_argument("--out", required=True, help="a new .parquet file")


def buffer_stats(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer stats")
    from exgrpo_fast.cli.buffer_session import stats_session

    stats_session(Path(arguments.path), as_json=arguments.json)
    return 0


def buffer_ls(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer ls")
    from exgrpo_fast.cli.buffer_session import list_session

    list_session(
        Path(arguments.path),
        sort=arguments.sort,
        bucket=arguments.bucket,
        limit=arguments.limit,
    )
    return 0


def buffer_show(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer show")
    from exgrpo_fast.cli.buffer_session import show_session

    show_session(Path(arguments.path), arguments.id)
    return 0


def buffer_prune(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer prune")
    require_absent(arguments.out)
    if arguments.max_age is None and arguments.max_per_question is None:
        raise ConfigError("buffer prune: give --max-age STEPS, --max-per-question N or both")
    from exgrpo_fast.cli.buffer_session import prune_session

    prune_session(
        Path(arguments.path),
        Path(arguments.out),
        max_age=arguments.max_age,
        max_per_question=arguments.max_per_question,
    )
    return 0


def buffer_export(arguments: argparse.Namespace) -> int:
    require_file(arguments.path, "buffer export")
    require_absent(arguments.out)
    from exgrpo_fast.cli.buffer_session import export_session

    export_session(Path(arguments.path), Path(arguments.out))
    return 0
