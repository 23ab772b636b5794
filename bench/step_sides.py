"""One trainer, one case, in a process of its own: what `bench/step.py` starts and reads.

Both sides get the same folder (model, tokenizer), the same rows and the same reward. A step is one
generation and one optimiser update. A step's time runs from its beginning to that of the next one,
so it holds all that a trainer does in between: metrics, log lines, its data loader.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from loss import resident
from torch.profiler import ProfilerActivity, profile

SETTINGS = {"lr": 1e-6, "max_grad_norm": 1.0, "weight_decay": 0.0, "clip": 0.2}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Shape of a model and of its steps."""

    vocab: int
    completion_tokens: int  # the limit
    mean_tokens: int | None = None  # one draw in so many ends a completion; None: only the limit
    prompts: int = 4  # in a step
    group_size: int = 8
    prompt_tokens: int = 32
    layers: int = 3
    width: int = 128
    microbatch_sequences: int = 8
    checkpointing: bool = True
    model: str | None = None  # a pretrained one, which asks sums; its vocabulary, layers and width

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size

    @property
    def end_tokens(self) -> list[int]:
        """The tokenizer's own, the last, is never drawn (`step.make_folder`)."""
        drawn = self.vocab // self.mean_tokens if self.mean_tokens else 0
        return [self.vocab - 1, *range(2, 2 + drawn)]


@dataclass
class Probe:
    """Marks the beginnings of steps; the figures of those that count are taken between two marks.

    `warmup` steps come first. Memory: the peak of the resident set of the steps that count and of
    the warm-up, above what the process held with its model loaded and its trainer made. With
    `allocations` one step is recorded by the profiler instead, byte by byte.
    """

    warmup: int
    allocations: bool
    resident_before: int = 0
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    recorder: Any = None
    peak_allocated: int | None = None

    def made(self) -> None:
        """Everything is loaded, no step has been made."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        self.resident_before = resident("VmRSS")

    def mark(self) -> None:
        """A step begins, or the last one has ended."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
            self.peak_allocated, self.recorder = peak_of(self.recorder), None
        self.walls.append(time.perf_counter())
        self.cpus.append(cpu_seconds())
        if len(self.walls) == self.warmup + 1:
            self.phases.clear()
            if self.allocations:
                self.recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.recorder.__enter__()

    def timed(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its seconds added to a phase."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - began

        return wrapped

    def figures(self) -> dict[str, Any]:
        def steps(marks: list[float]) -> list[float]:
            return [b - a for a, b in zip(marks, marks[1:], strict=False)][self.warmup :]

        walls = steps(self.walls)
        return {
            "step_seconds": walls,
            "step_cpu_seconds": steps(self.cpus),
            "phase_seconds": {name: value / len(walls) for name, value in self.phases.items()},
            "resident_before_mib": self.resident_before / MIB,
            "resident_peak_mib": (resident("VmHWM") - self.resident_before) / MIB,
            "allocated_peak_mib": None
            if self.peak_allocated is None
            else self.peak_allocated / MIB,
        }


def cpu_seconds() -> float:
    """Of this process and of its children, the running ones included."""
    ticks = 0
    for pid in (os.getpid(), *children()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime


def children() -> list[int]:
    threads = Path("/proc/self/task").glob("*/children")
    return [int(pid) for listed in threads for pid in listed.read_text().split()]


def peak_of(recorded: Any) -> int:
    """The most bytes that were allocated at a time, above what was there."""
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


# ---- exgrpo-fast ---------------------------------------------------------------------------------


def run_ours(case: Case, folder: Path, out: Path, probe: Probe, steps: int) -> dict[str, float]:
    # What the first step's completion table would load, and TRL has loaded: imports do not count.
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from exgrpo_fast.build.run import open_run
    from exgrpo_fast.config import validate
    from exgrpo_fast.run.directory import RunFolder
    from exgrpo_fast.run.display.live import make_screen

    config = validate(
        {
            "method": "dr_grpo",
            "model": {"name": str(folder), "gradient_checkpointing": case.checkpointing},
            "data": {
                "train": str(folder / "rows.jsonl"),
                "max_prompt_tokens": case.prompt_tokens,
                "check_answers": False,  # the reward knows no right answer
            },
            "reward": {"functions": [f"{folder / 'reward.py'}:pseudo_random"]},
            "rollout": {
                "engine": "transformers",
                "prompts_per_step": case.prompts,
                "group_size": case.group_size,
                "max_completion_tokens": case.completion_tokens,
            },
            "train": {
                "max_steps": 1000,
                "max_tokens_per_microbatch": case.microbatch_sequences
                * (case.prompt_tokens + case.completion_tokens),
                "lr": SETTINGS["lr"],
                "weight_decay": SETTINGS["weight_decay"],
                "max_grad_norm": SETTINGS["max_grad_norm"],
            },
            "checkpoint": {"every": 0},
        }
    )
    run_folder = RunFolder(out / "run", resume=False)
    with open_run(config, run_folder, make_screen(), device="cpu", resume_from=None) as trainer:
        step = trainer.step

        def marked() -> Any:
            probe.mark()
            batch, metrics = step()
            for name in ("rollout", "score", "reward", "update"):
                probe.phases[name] = probe.phases.get(name, 0.0) + metrics[f"seconds_{name}"]
            return batch, metrics

        trainer.step = marked
        trainer.save = lambda: (probe.mark(), out)[1]  # the end of the last step
        probe.made()
        trainer.train(stop_after=probe.warmup + steps)
    lines = [json.loads(line) for line in run_folder.metrics.read_text().splitlines()]
    counted = lines[probe.warmup :]
    return {
        "tokens": sum(line["tokens_generated"] for line in counted) / len(counted),
        "learnable_frac": lines[-1]["learnable_frac"],
    }


# ---- TRL -----------------------------------------------------------------------------------------


def run_trl(case: Case, folder: Path, out: Path, probe: Probe, steps: int) -> dict[str, float]:
    sys.path.insert(0, str(folder))
    from datasets import Dataset
    from reward import pseudo_random  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    class Marks(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            probe.mark()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            figures = trainer._metrics["train"]  # emptied by each log line
            lengths.append(figures["completions/mean_length"][-1])
            silent.append(figures["frac_reward_zero_std"][-1])

        def on_train_end(self, *arguments: Any, **named: Any) -> None:
            probe.mark()

    lengths: list[float] = []
    silent: list[float] = []
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer: Any = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=pseudo_random,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Marks()],
        args=GRPOConfig(
            output_dir=str(out / "trl"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=probe.warmup + steps,
            per_device_train_batch_size=case.microbatch_sequences,
            gradient_accumulation_steps=case.sequences // case.microbatch_sequences,
            num_generations=case.group_size,
            max_completion_length=case.completion_tokens,
            gradient_checkpointing=case.checkpointing,
            loss_type="dr_grpo",
            scale_rewards="none",
            epsilon=SETTINGS["clip"],
            learning_rate=SETTINGS["lr"],
            lr_scheduler_type="constant",
            weight_decay=SETTINGS["weight_decay"],
            max_grad_norm=SETTINGS["max_grad_norm"],
        ),
    )
    trainer._generate = probe.timed("rollout", trainer._generate)
    trainer._calculate_rewards = probe.timed("reward", trainer._calculate_rewards)
    prepare = probe.timed("prepared", trainer._generate_and_score_completions)
    trainer._generate_and_score_completions = prepare
    trainer.training_step = probe.timed("update", trainer.training_step)
    probe.made()
    trainer.train()
    phases = probe.phases  # generation is a part of the first training step
    prepared = phases.pop("prepared")
    phases["update"] -= prepared
    phases["score"] = prepared - phases["rollout"] - phases["reward"]
    counted = lengths[probe.warmup :]
    return {
        "tokens": sum(counted) / len(counted) * case.sequences,
        "learnable_frac": 1.0 - silent[-1],
    }


SIDES = {"exgrpo_fast": run_ours, "trl": run_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--case", required=True, help="fields of Case as JSON")
    parser.add_argument("--folder", required=True, type=Path, help="model, tokenizer, rows, reward")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--allocations", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = Case(**json.loads(arguments.case))
    probe = Probe(arguments.warmup, arguments.allocations)
    work = SIDES[arguments.side](case, arguments.folder, arguments.out, probe, arguments.steps)
    result = {"side": arguments.side, "case": asdict(case), **work, **probe.figures()}
    (arguments.out / "figures.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
