"""Toy runs of the real command, on one process and on two, to be held beside each other."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REWARDS
from forked import run_forked
from several_processes import TORCHRUN, environment
from torch.distributed import TCPStore

from exgrpo_fast.core.types import Trajectory
from exgrpo_fast.run.metrics import METRICS
from exgrpo_fast.training.collector import Batch

SETTINGS = f"""
    --data.train rows.jsonl --data.eval held_out.jsonl --data.check_answers false
    --reward.workers 1 --reward.functions [{REWARDS}:even_length] --rollout.engine transformers
    --rollout.prompts_per_step 4 --rollout.group_size 4 --rollout.max_completion_tokens 8
    --replay.start_success_rate null --train.lr 1e-3 --train.max_tokens_per_microbatch 1200
    --checkpoint.every 2 --checkpoint.keep 9 --eval.n 2 --eval.k [1,2] --device cpu
""".split()
SECONDS = 300


def arguments(folder: Path, count: int, out: str, *more: str) -> list[str]:
    model = ["--model.name", str(folder / "model")]
    alone = ["--no-supervise"] if count == 1 else []
    words = ["train", "exgrpo", "--out", out, *SETTINGS, *model, *alone, *more]
    return ["-m", "exgrpo_fast", *words]


def run(folder: Path, count: int, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """In forks that meet as torchrun lets them meet; what the first one says."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    several = [environment() | meeting | rank for rank in ranks]
    ended = run_forked(
        [arguments(folder, count, out, *more)] * count,
        folder=folder,
        environments=several if count > 1 else [environment()],
        seconds=SECONDS,
    )
    for process in ended:
        if process.returncode != 0:
            return process
    return ended[0]


def command(folder: Path, count: int, out: str, *more: str) -> list[str]:
    start = TORCHRUN if count == 2 else [sys.executable]
    return [*start, *arguments(folder, count, out, *more)]


def run_command(folder: Path, count: int, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The real command: `exgrpo-fast`, or under torchrun."""
    return subprocess.run(
        command(folder, count, out, *more),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def make_inputs(path: Path, model_folder: Path) -> None:
    """A model and questions."""
    shutil.copytree(model_folder, path / "model")
    for name, term, count in (("rows", 1, 8), ("held_out", 2, 3)):
        rows = [{"prompt": f"{i} + {term}?", "answer": "3"} for i in range(count)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def steps(run_folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(metrics.keys() <= METRICS.keys() for metrics in found)
    return found


def assert_same_course(ours: Path, expected: Path) -> None:
    ours_steps, expected_steps = steps(ours), steps(expected)
    assert [m["step"] for m in ours_steps] == [m["step"] for m in expected_steps] == [1, 2, 3, 4]
    for found, wanted in zip(ours_steps, expected_steps, strict=True):
        for name in ("loss", "entropy", "ratio_mean", "replay_ratio_mean"):
            gap = abs((found[name] or 0.0) - (wanted[name] or 0.0))
            # A replayed token's ratio is that of new weights to old ones, and AdamW has divided the
            # rounding of their gradients by small moments.
            bound = 3e-6 if name == "replay_ratio_mean" else 1e-6
            assert gap <= bound * max(1.0, abs(wanted[name] or 0.0)), (found["step"], name, gap)
        assert math.isclose(found["grad_norm"], wanted["grad_norm"], rel_tol=1e-5)
        for name in ("reward_mean", "tokens_trained", "tokens_generated", "replay_size"):
            assert found[name] == wanted[name], (found["step"], name)
    assert any(m["replay_frac"] > 0 for m in expected_steps), "nothing was replayed"


def replayed_in(batch: Batch) -> list[Trajectory]:
    return [t for group in batch.generated for t in group.from_source("replay")]
