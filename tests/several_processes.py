"""Runs a worker file on several processes that meet through a file: no port, no order of starting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "kernels"]
SECONDS = 300


def environment() -> dict[str, str]:
    """One thread for each process, and the sources of this checkout."""
    paths = os.pathsep.join(map(str, PATHS))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run_processes(count: int, worker: Path, *words: str) -> list[Any]:
    """`worker` is called with RANK COUNT STORE WORDS; what each prints last is JSON, rank by rank."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, str(worker), str(rank), str(count), f"{folder}/store", *words]
            for rank in range(count)
        ]
        processes = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            for command in commands
        ]
        try:
            ended = [process.communicate(timeout=SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def join_group(arguments: Sequence[str]) -> tuple[int, int, list[str]]:
    """In a worker: (rank, count, its own words), once all have met."""
    import torch
    import torch.distributed as dist

    rank, count, store, *words = arguments
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(count),
        timeout=timedelta(seconds=SECONDS),
    )
    return int(rank), int(count), words
