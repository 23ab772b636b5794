"""`exgrpo-fast init` and `exgrpo-fast export`: a new folder for the user."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.inputs import require_file
from exgrpo_fast.cli.parsing import add_command
from exgrpo_fast.config import ConfigError, recipe_names


def add_init(commands: Any) -> None:
    text = "write config.yaml, reward.py and sample data into a folder"
    c = add_command(commands, "init", init, text)
    c.add_argument("folder")
    c.add_argument("--recipe", default="exgrpo", choices=recipe_names())


def init(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.cli.scaffold import write_project

    try:
        for path in write_project(Path(arguments.folder), recipe=arguments.recipe):
            print(path)
    except OSError as error:
        raise ConfigError(f"init {arguments.folder}: {error.strerror}") from None
    return 0


def add_export(commands: Any) -> None:
    text = "a model out of a checkpoint, as other tools read it"
    c = add_command(commands, "export", export, text)
    c.add_argument("out", help="a new folder")
    c.add_argument("--checkpoint", required=True, help="a checkpoint, or a run folder (its newest)")
    c.add_argument(
        "--to",
        choices=("hf", "merged", "adapter"),
        default="hf",
        help="hf, merged: a Hugging Face folder, any adapter merged; adapter: peft's own format",
    )


def export(arguments: argparse.Namespace) -> int:
    require_file(arguments.checkpoint, "--checkpoint")
    from exgrpo_fast.cli.export import export_checkpoint
    from exgrpo_fast.run.checkpoint.format import find_checkpoint

    checkpoint = find_checkpoint(
        Path(arguments.checkpoint), lambda why: print(f"passed over: {why}", file=sys.stderr)
    )
    print(export_checkpoint(checkpoint, arguments.to, Path(arguments.out)))
    return 0
