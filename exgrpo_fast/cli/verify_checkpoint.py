"""`exgrpo-fast verify-checkpoint`: is a checkpoint complete and unchanged?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.config import ConfigError


def add_verify_checkpoint(commands: Any) -> None:
    text = "whether a checkpoint is whole; else exit code 1 and the bad file"
    c = add_command(commands, "verify-checkpoint", verify_checkpoint, text)
    c.add_argument("folder", metavar="DIR", help="such as RUN/checkpoints/step_N")


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.run.checkpoint.manifest import CheckpointError, verify

    if (Path(arguments.folder) / "checkpoints").is_dir():
        raise ConfigError(f"{arguments.folder} is a run; its checkpoints are in checkpoints/step_N")
    try:
        verify(Path(arguments.folder))
    except CheckpointError as error:
        print(f"bad: {error}")
        return 1
    print(f"ok: {arguments.folder}")
    return 0
