"""`exgrpo-fast fetch`: make a model that is no Hugging Face folder yet into one, ahead of a run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from exgrpo_fast.cli.arguments import add_command


def add_fetch(commands: Any) -> None:
    text = "the folder of smollm2 or of a .gguf file, fetched and converted once"
    c = add_command(commands, "fetch", fetch, text)
    c.add_argument("model", help="as model.name: smollm2, a .gguf file or a folder with one")


def fetch(arguments: argparse.Namespace) -> int:
    from exgrpo_fast.build.environment import quiet_libraries
    from exgrpo_fast.build.pretrained import model_folder
    from exgrpo_fast.run.display.live import make_screen

    quiet_libraries()
    screen = make_screen(sys.stderr)  # stdout is for the path alone
    try:
        folder = model_folder(arguments.model, screen)
    finally:
        screen.close()
    print(folder)
    return 0
