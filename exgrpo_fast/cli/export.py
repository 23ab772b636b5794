"""`exgrpo-fast export`: the model of a checkpoint, in a folder that other tools read."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command, require_file
from exgrpo_fast.core.errors import UserError

# --to -> the folder of a checkpoint that holds it: the adapter is merged in hf/ already.
FORMS = {"hf": "hf", "merged": "hf", "adapter": "adapter"}


def add_export(commands: Any) -> None:
    text = "a model out of a checkpoint, as other tools read it"
    c = add_command(commands, "export", export, text)
    c.add_argument("out", help="a new folder")
    c.add_argument("--checkpoint", required=True, help="a checkpoint, or a run folder (its newest)")
    c.add_argument(
        "--to",
        choices=tuple(FORMS),
        default="hf",
        help="hf, merged: a Hugging Face folder, any adapter merged; adapter: peft's own format",
    )


def export(arguments: argparse.Namespace) -> int:
    require_file(arguments.checkpoint, "--checkpoint")
    from exgrpo_fast.run.checkpoint.manifest import find_checkpoint

    checkpoint = find_checkpoint(
        Path(arguments.checkpoint), lambda why: print(f"passed over: {why}", file=sys.stderr)
    )
    print(export_checkpoint(checkpoint, arguments.to, Path(arguments.out)))
    return 0


def export_checkpoint(checkpoint: Path, form: str, out: Path) -> str:
    """Copy one form of the model of a verified checkpoint to `out`, by one rename.

    UserError where `out` is there, or the run had no adapter.
    """
    if out.exists():
        raise UserError(f"export {out}: is there already")
    source = checkpoint / FORMS[form]
    if form == "adapter" and not source.exists():
        raise UserError(f"--to adapter: {checkpoint} is of a run without model.lora")
    unfinished = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        os.rename(unfinished, out)
    except OSError as error:
        raise UserError(f"export {out}: {error.strerror}") from None
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return f"{out}: {form} of {checkpoint}, {num_bytes / 2**20:.1f} MiB"
