"""`exgrpo-fast fetch`: make a model that is no Hugging Face folder yet into one, ahead of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.core.errors import UserError


def add_fetch(commands: Any) -> None:
    text = "download and convert smollm2 or a .gguf file once; prints its folder"
    c = add_command(commands, "fetch", fetch, text)
    c.add_argument(
        "model", metavar="MODEL", help="as model.name: smollm2, a .gguf file or a folder with one"
    )


def fetch(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.build.pretrained import fetch_model

    folder = fetch_model(arguments.model)
    if not Path(folder).is_dir():
        raise UserError(
            f"fetch: {folder} is neither smollm2 nor a .gguf file nor a folder; the model of a hub name "
            f"is fetched when a run starts"
        )
    print(folder)
    return 0
