"""Runs scripts in forks of a server that has loaded torch, transformers and the trainer already.

A process of its own, as `python script.py` is, without the five CPU seconds of its imports. What a
test says about the start of a process needs `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["exgrpo_fast.cli.train_run", "transformers.models.qwen3.modeling_qwen3"]
)


def run_forked(
    commands: Sequence[Sequence[str]],
    *,
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    seconds: float,
) -> list[subprocess.CompletedProcess[str]]:
    """Run all `commands` at a time in `folder`, each of `["-m", module, ...]` or `[file, ...]`.

    `environments`: all variables of each. subprocess.TimeoutExpired after `seconds`.
    """
    outputs = [(folder / f"stdout.{n}", folder / f"stderr.{n}") for n in range(len(commands))]
    processes = [
        _FORKS.Process(target=_run, args=(list(words), folder, dict(environment), *streams))
        for words, environment, streams in zip(commands, environments, outputs, strict=True)
    ]
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.is_alive() for process in processes):
            raise subprocess.TimeoutExpired(str(commands), seconds)
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(words, process.exitcode or 0, *(s.read_text() for s in streams))
        for words, process, streams in zip(commands, processes, outputs, strict=True)
    ]


def _run(
    words: list[str], folder: Path, environment: dict[str, str], output: Path, errors: Path
) -> None:
    """In the fork."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
