"""Runs a worker file on several processes that meet through a file: no port, no order of starting."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from forked import run_forked

from exgrpo_fast.core.process_group import Processes, joined
from exgrpo_fast.core.torchrun import RankInfo

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "kernels"]
SECONDS = 300
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment() -> dict[str, str]:
    """One thread for each process, and the sources of this checkout."""
    paths = os.pathsep.join(map(str, PATHS))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run_processes(count: int, worker: Path, *words: str) -> list[Any]:
    """`worker` is called with RANK COUNT STORE and `words`; what each prints last is JSON, rank by rank."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [str(worker), str(rank), str(count), f"{folder}/store", *words] for rank in range(count)
        ]
        environments = [environment()] * count
        ended = run_forked(
            commands, folder=Path(folder), environments=environments, seconds=SECONDS
        )
    for process in ended:
        assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(process.stdout.splitlines()[-1]) for process in ended]


@contextlib.contextmanager
def met(arguments: Sequence[str], device: str = "cpu") -> Iterator[Processes]:
    """In a worker, whose words these are: all processes, met as a run under torchrun meets them.

    They part again as a run does: gloo's threads abort a process that ends without.
    """
    rank, count, store = arguments
    torch.set_num_threads(1)
    place = RankInfo(int(rank), int(count), int(rank))
    with joined(place, device, deadline=SECONDS, store=f"file://{store}") as processes:
        yield processes


def workers_of(pid: int) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, children))


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
