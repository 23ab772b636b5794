"""TRL as it is beside TRL with each adapter: time, memory, error of one micro-batch.

    .venv-adapters/bin/python bench/adapters.py [--repeats 7 --out bench/results/cpu]

One random Llama with a real vocabulary (49,152) and one padded micro-batch; every side computes
TRL's DAPO loss of it and its gradients, round-robin in one process: the order changes nothing, and
what else the machine does meets all sides alike. Times are those of a clock and of the processor, the
second of which other processes disturb less. The peak is that of a process which does nothing
else; the error is that of the head's gradient against TRL's own in float64. Liger is what TRL's
`use_liger_kernel` switches on. The last line of stdout is JSON.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from loss import resident

PACKAGES = ("torch", "transformers", "trl", "liger-kernel")
SIDES = ("TRL", "TRL, use_liger_kernel", "use_fused_head", "FusedGRPOTrainer")
MIB = 2**20


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_trainer(side: str, options: argparse.Namespace, dtype: torch.dtype):
    """A trainer that is only asked for losses; the same weights on every side."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from exgrpo_kernels.adapters.trl import FusedGRPOTrainer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        tie_word_embeddings=False,
    )
    kind = FusedGRPOTrainer if side == "FusedGRPOTrainer" else GRPOTrainer
    trainer = kind(
        model=LlamaForCausalLM(config).to(dtype=dtype),  # pyright: ignore
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=options.batch,
            num_generations=options.batch,
            max_completion_length=options.completion,
            use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=side == "TRL, use_liger_kernel",
            bf16=False,
            activation_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["<eos>"] * options.batch}),
        processing_class=tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def micro_batch(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """Completions of a quarter to the whole limit, old log-probs near those of a random model."""
    g = torch.Generator().manual_seed(1)
    shape = (options.batch, options.completion)
    lengths = torch.linspace(options.completion // 4, options.completion, options.batch).long()
    mask = (torch.arange(options.completion) < lengths[:, None]).long()
    uniform = -torch.log(torch.tensor(float(options.vocab)))
    inputs = {
        "prompt_ids": torch.randint(2, options.vocab, (options.batch, options.prompt), generator=g),
        "prompt_mask": torch.ones(options.batch, options.prompt, dtype=torch.long),
        "completion_ids": torch.randint(2, options.vocab, shape, generator=g),
        "completion_mask": mask,
        "advantages": torch.randn(options.batch, generator=g),
        "old_per_token_logps": uniform + 0.1 * torch.randn(shape, generator=g),
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def step_of(
    side: str, options: argparse.Namespace, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A function that makes the loss and all gradients once, and returns the head's [V, D]."""
    from exgrpo_kernels.adapters.trl import use_fused_head

    trainer = make_trainer(side, options, dtype)
    inputs = micro_batch(options, trainer.model.device)

    def step() -> torch.Tensor:
        trainer.model.zero_grad()
        undo = use_fused_head() if side == "use_fused_head" else lambda: None
        try:
            trainer.compute_loss(trainer.model, dict(inputs)).backward()
        finally:
            undo()
        return trainer.model.lm_head.weight.grad

    return step


def why_absent(side: str) -> str | None:
    if side == "TRL, use_liger_kernel":
        try:
            version("liger-kernel")
        except PackageNotFoundError:
            return "liger-kernel is not installed"
    return None


def peak_mib(side: str, options: argparse.Namespace) -> float:
    """Peak resident set of the second step above the loaded model, in a separate process."""
    command = [sys.executable, __file__, "--peak-of", side, "--batch", str(options.batch)]
    for name in ("prompt", "completion", "vocab", "hidden", "layers"):
        command += [f"--{name}", str(getattr(options, name))]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(made.stdout.splitlines()[-1])


def print_peak(side: str, options: argparse.Namespace) -> None:
    step = step_of(side, options, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    step()
    step()
    print((resident("VmHWM") - before) / MIB)


def measure(options: argparse.Namespace) -> list[dict]:
    exact = step_of("TRL", options, torch.float64)()
    rows, steps = [], {}
    for side in SIDES:
        if reason := why_absent(side):
            rows.append({"side": side, "absent": reason})
            continue
        try:
            steps[side] = step_of(side, options, torch.float32)
            error = (steps[side]() - exact).norm() / exact.norm()
        except Exception as problem:
            steps.pop(side, None)
            rows.append({"side": side, "absent": f"{type(problem).__name__}: {problem}"[:120]})
            continue
        rows.append({"side": side, "gradient_error": error.item()})
    walls: dict[str, list[float]] = {side: [] for side in steps}
    processors: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(options.repeats):
        for side, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            walls[side].append(time.perf_counter() - wall)
            processors[side].append(time.process_time() - processor)
    for row in rows:
        if (side := row["side"]) in steps:
            row["seconds"] = statistics.median(walls[side])
            row["cpu_seconds"] = statistics.median(processors[side])
            row["times_trl"] = median_ratio(walls[side], walls["TRL"])
            row["cpu_times_trl"] = median_ratio(processors[side], processors["TRL"])
            row["peak_mib"] = peak_mib(side, options)
    return rows


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of the rounds, each of which compares what ran one after the other."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def draw(rows: list[dict], path: Path) -> None:
    """Time, processor time and memory beside TRL's own."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no figure: matplotlib is not installed")
        return
    measured = [row for row in rows if "absent" not in row]
    base = next(row for row in measured if row["side"] == "TRL")
    panels = {
        "time, TRL = 1": [row["times_trl"] for row in measured],
        "processor time, TRL = 1": [row["cpu_times_trl"] for row in measured],
        "peak memory, TRL = 1": [row["peak_mib"] / base["peak_mib"] for row in measured],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 2.2), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh([row["side"] for row in measured], values, color="#4878a8")
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("batch", 4),
        ("prompt", 64),
        ("completion", 256),
        ("vocab", 49152),
        ("hidden", 576),
        ("layers", 2),
        ("repeats", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", choices=SIDES)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options)
        return
    rows = measure(options)
    cells = [
        (
            row["side"],
            row["absent"]
            if "absent" in row
            else f"{row['seconds']:.2f} s   {row['times_trl']:.2f}x   cpu {row['cpu_seconds']:.2f} s"
            f"   {row['cpu_times_trl']:.2f}x   {row['peak_mib']:.0f} MiB   "
            f"{row['gradient_error']:.1e}",
        )
        for row in rows
    ]
    for side, text in cells:
        print(f"{side:24} {text}")
    shape = {n: getattr(options, n) for n in vars(options) if n not in ("out", "peak_of")}
    result = {
        "date": datetime.date.today().isoformat(),
        "device": "cuda" if torch.cuda.is_available() else f"cpu ({os.cpu_count()} cores)",
        "python": platform.python_version(),
        "versions": versions(),
        "load_average": os.getloadavg()[0],
        "shape": shape,
        "rows": rows,
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "adapters.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, options.out / "adapters.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
