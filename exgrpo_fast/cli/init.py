"""`exgrpo-fast init`: a folder to start from, with a config, a reward and three rows of data."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.config import ConfigError, recipe_names

START = """
model:
  name: Qwen/Qwen2.5-1.5B  # or a local folder
data:
  train: "{folder}/train.jsonl"
  eval: null
  prompt_field: prompt
  answer_field: answer
reward:
  functions: [math_verify, "{folder}/reward.py:short"]
  weights: [1.0, 0.0]
"""

REWARD = '''"""A reward of your own: the signature is TRL's. Try it with

    exgrpo-fast score --in rows.jsonl --out scored.jsonl --functions {folder}/reward.py:short
"""


def short(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
    """1.0 for at most 500 characters. `columns` holds the data's other fields, `answer` among
    them; None leaves a sample unscored. An exception costs that sample only."""
    return [1.0 if len(completion) <= 500 else 0.0 for completion in completions]
'''

ROWS = """\
{"prompt": "What is 17 + 25? Put the answer in \\\\boxed{}.", "answer": "42"}
{"prompt": "What is 9 * 12? Put the answer in \\\\boxed{}.", "answer": "108"}
{"prompt": "What is 3/4 of 64? Put the answer in \\\\boxed{}.", "answer": "48"}
"""


def add_init(commands: Any) -> None:
    text = "write config.yaml, reward.py and sample data into a folder"
    c = add_command(commands, "init", init, text)
    c.add_argument("folder", metavar="FOLDER", help="made where it is missing")
    recipe = {"choices": recipe_names(), "metavar": "RECIPE", "default": "exgrpo"}
    c.add_argument("--recipe", help="one that `train --help` lists (exgrpo)", **recipe)


def init(arguments: argparse.Namespace) -> int:
    try:
        for path in write_project(Path(arguments.folder), recipe=arguments.recipe):
            print(path)
    except OSError as error:
        raise ConfigError(f"init {arguments.folder}: {error.strerror}") from None
    print(f"next: exgrpo-fast train {arguments.folder}/config.yaml --dry-run")
    return 0


def write_project(folder: Path, *, recipe: str) -> Iterator[Path]:
    """Write config.yaml, reward.py and train.jsonl; never over a file that is there."""
    text = (resources.files("exgrpo_fast.config") / "recipes" / f"{recipe}.yaml").read_text()
    has_model = "name" in yaml.safe_load(text).get("model", {})
    start = "" if has_model else START.format(folder=folder)
    files = {
        "config.yaml": text + start,
        "reward.py": REWARD.replace("{folder}", str(folder)),
        "train.jsonl": ROWS,
    }
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(f"init {folder}: {', '.join(there)} is there already")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
        yield folder / name
