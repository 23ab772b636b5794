"""`exgrpo-fast bench`: the scripts of bench/, which lie beside the package in the repository."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exgrpo_fast
from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.cli.output import print_lines
from exgrpo_fast.config import ConfigError, suggest


def add_bench(commands: Any) -> None:
    c = add_command(
        commands, "bench", bench, "measure against other implementations; without a name: a list"
    )
    c.add_argument("name", nargs="?", metavar="NAME", help="such as loss, rollout, step, memory")
    c.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        help="options of that measurement; NAME --help lists them",
    )


def bench(arguments: argparse.Namespace) -> int:
    """The script's own exit code."""
    scripts = dict(benchmarks(bench_folder()))
    if not scripts:
        raise ConfigError(
            "bench: the benchmarks are not in the package; run it from the repository"
        )
    if arguments.name is None:
        width = max(map(len, scripts))
        for name, path in scripts.items():
            print_lines(f"{name:{width}}  {first_line(path)}", indent=" " * (width + 2))
        return 0
    if arguments.name not in scripts:
        hint = suggest(arguments.name, list(scripts)) or "; without a name: a list"
        raise ConfigError(f"bench: there is no '{arguments.name}'{hint}")
    command = [sys.executable, str(scripts[arguments.name]), *arguments.words]
    return subprocess.run(command).returncode


def bench_folder() -> Path:
    return Path(exgrpo_fast.__file__).parents[1] / "bench"


def benchmarks(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, script) of every file that can be run; the others are what these share."""
    for path in sorted(folder.glob("*.py")):
        if '__name__ == "__main__"' in path.read_text():
            yield path.stem, path


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
