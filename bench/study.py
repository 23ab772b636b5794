"""What the studies share: starts and runs that are made once, intervals over seeds, the record."""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 10: 2.262}


def warm_start(recipe: str, path: Path, seed: int) -> None:
    """The quickstart's initial policy of a seed, made once for all arms."""
    if path.exists():
        return
    from exgrpo_fast.build.quickstart.prepare import prepare_quickstart
    from exgrpo_fast.config import load_config
    from exgrpo_fast.run.display import Screen

    path.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(recipe, [("train.seed", str(seed))])
    prepare_quickstart(config, path, Screen(), device="cpu")


def train(folder: Path, recipe: str, options: Sequence[str]) -> None:
    """The command, unless its run is there; it goes on with one that was stopped."""
    if is_finished(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "exgrpo_fast", "train", recipe, "--out", str(folder)]
    with open(f"{folder}.log", "w") as log:
        words = [*command, "--resume", "auto", *options]
        subprocess.run(words, check=True, stdout=log, stderr=log)


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists() and bool(summary(folder)["eval_after"])


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fresh_completions(steps: Sequence[dict]) -> list[int]:
    """How many each step generated, from the tokens and the mean length."""
    return [round(step["tokens_generated"] / step["completion_len_mean"]) for step in steps]


def interval(values: list[float]) -> dict:
    """Mean and 95 % Student interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": values}
    quantile = T_95.get(len(values), 2.0)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


def bounds(found: dict) -> str:
    return "" if found["low"] is None else f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def save(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The record with date, device and version, which is returned, too."""
    import torch
    import transformers

    record = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu ({platform.machine()}), 1 thread a run",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    return record
