"""`exgrpo-fast results`: the tables of the pages, made from the files of bench/results/."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.cli.bench import bench_folder
from exgrpo_fast.config import ConfigError


def add_results(commands: Any) -> None:
    text = "measured tables, and the command that measures each again; without a name: a list"
    c = add_command(commands, "results", results, text)
    c.add_argument("names", nargs="*", metavar="NAME", help="such as replay_study, step, packing")


def results(arguments: argparse.Namespace) -> int:
    """The exit code of bench/doc_tables.py."""
    script = bench_folder() / "doc_tables.py"
    if not script.exists():
        raise ConfigError("results: they are not in the package; run it from the repository")
    return subprocess.run([sys.executable, str(script), *arguments.names]).returncode
