"""`export`: a model out of a checkpoint, in a folder of its own that other tools read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from exgrpo_fast.core.errors import UserError

# What is asked for -> the folder of the checkpoint that is it: hf/ has the adapter merged already.
FORMS = {"hf": "hf", "merged": "hf", "adapter": "adapter"}


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
