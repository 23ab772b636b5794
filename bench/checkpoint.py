"""How long does saving block training? A quickstart step beside the save that follows it.

    python bench/checkpoint.py [--device cpu] [--rounds 7] [--out FILE]

Each round: a step, a save of the kind that training does (host copy, then a thread that writes while
the next step runs), the step beside the writer, and the same checkpoint written while training waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from exgrpo_fast.build.environment import package_versions
from exgrpo_fast.build.run import open_run
from exgrpo_fast.config import load_config
from exgrpo_fast.run.checkpoint.manifest import folder_bytes
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.trainer import Trainer

# The warm start only makes the responses stop; a short one gives a realistic step.
SETTINGS = [("warm_start.batches", "150"), ("eval.n", "1"), ("eval.k", "[1]")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = load_config("quickstart", SETTINGS)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name), resume=False)
        with open_run(
            config, folder, Screen(), device=arguments.device, resume_from=None
        ) as trainer:
            result = measure(trainer, arguments.rounds)
        folder.close()
    out = arguments.out or Path(f"bench/results/{arguments.device}/checkpoint.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(surroundings(arguments.device) | result, indent=1) + "\n")
    print(json.dumps(result))


def measure(trainer: Trainer, rounds: int) -> dict[str, float]:
    for _ in range(3):  # warms up the libraries, and gives the moments and the store something
        trainer.step()
    trainer.save()
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - start)

    for _ in range(rounds):
        timed("step", trainer.step)
        timed("blocked", lambda: trainer.writer.save(trainer.num_steps, trainer.state_dict()))
        timed("step_beside_writer", trainer.step)
        timed("left_to_wait_for", trainer.writer.wait)
        timed("written_while_training_waits", trainer.save)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    step, blocked = medians["step_seconds"], medians["blocked_seconds"]
    newest = trainer.checkpoints.folder / f"step_{trainer.checkpoints.steps()[-1]}"
    return {
        **medians,
        "blocked_share_of_a_step": blocked / step,
        "rounds": rounds,
        "checkpoint_bytes": folder_bytes(newest),
        "stored_trajectories": len(trainer.state_dict()["replay"]["store"]["lengths"]),
    }


def surroundings(device: str) -> dict[str, object]:
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{chip}, {platform.machine()}",
        "versions": package_versions(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
