"""Steps per second and peak memory of a training run, beside TRL's GRPOTrainer.

    pip install -c constraints.txt -e ".[train,bench]"
    python bench/step.py [--cases small-64 large-256] [--repeats 3]

Dr.GRPO on a random model made on the spot: same weights, rows, reward, group size, lengths,
learning rate, loss, dtype (float32), micro-batch, gradient checkpointing and number of threads, one
optimiser update a step. Both generate with transformers. Where completions are to have their full
length, the only end token has a probability of 0; in the cases called `varied` every so many
tokens of the vocabulary end one, which leads to the same distribution of lengths on both sides.
The case `smollm2` is that chat model as it is, 8 questions x 8 completions, each of at most 32 tokens.
The reward is a hash of the text, so hardly a group is without a gradient. What the two do by default
they do: TRL a log line every ten steps, ours a line of metrics every step and rewards in worker
processes, whose CPU time counts. Saving and evaluation are off. TRL takes its completions'
log-probabilities from the update itself, since they are on-policy; ours are scored, with their
entropies, before it.

The cases called `fast` take the whole batch as one micro-batch and checkpoint nothing. TRL is
otherwise as its defaults are; Liger's layers, which it also offers, need a GPU.

Each run is a process of its own, and the sides take turns, the order changing. `resident` is the
peak of the process above what it held with the model loaded; `allocated` the same of torch's
allocations in one step, from a run that is not timed. Ratios are those of medians, ours over TRL's.
Wall times share the machine with whatever else runs; CPU seconds hardly depend on it.

Without TRL our side runs alone. Writes step.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from loss import installed, machine
from step_sides import Case
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from exgrpo_fast.build.pretrained import fetch_model

CASES = {
    "small-64": Case(vocab=512, completion_tokens=64),
    "small-256": Case(vocab=512, completion_tokens=256),
    "small-varied": Case(vocab=512, completion_tokens=256, mean_tokens=64),
    "small-64-fast": Case(
        vocab=512, completion_tokens=64, microbatch_sequences=32, checkpointing=False
    ),
    "large-64": Case(vocab=32768, completion_tokens=64, prompts=2),
    "large-256": Case(vocab=32768, completion_tokens=256, prompts=1),
    "large-varied": Case(vocab=32768, completion_tokens=256, mean_tokens=64, prompts=2),
    "large-64-fast": Case(
        vocab=32768,
        completion_tokens=64,
        prompts=2,
        microbatch_sequences=16,
        checkpointing=False,
    ),
    "smollm2": Case(
        model="smollm2",
        vocab=49152,
        layers=30,
        width=576,
        completion_tokens=32,
        prompts=8,
        prompt_tokens=64,
        checkpointing=False,
    ),
}
ROWS = 256
REWARD = '''"""A reward that means nothing, costs nothing and differs from text to text."""

import zlib


def pseudo_random(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]
'''


# ---- the same work for both ----------------------------------------------------------------------


def make_folder(case: Case, folder: Path) -> None:
    """Model, tokenizer, rows and reward."""
    if case.model is None:
        prompts = make_model(case, folder)
    else:
        shutil.copytree(fetch_model(case.model), folder, dirs_exist_ok=True)
        sums = [(a, b) for a in range(1, 17) for b in range(1, 17)]
        prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    rows = [{"prompt": prompt, "answer": "0"} for prompt in prompts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


def make_model(case: Case, folder: Path) -> list[str]:
    """A random one, and prompts of it. A word a token; the end token is never drawn."""
    words = ["<unknown>", "<pad>", *(f"w{i}" for i in range(2, case.vocab - 1)), "<end>"]
    numbered = {word: i for i, word in enumerate(words)}
    raw = tokenizers.Tokenizer(models.WordLevel(numbered, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    ).save_pretrained(folder)
    heads = max(case.width // 64, 1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=case.vocab,
            hidden_size=case.width,
            intermediate_size=3 * case.width,
            num_hidden_layers=case.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=1,
            eos_token_id=case.end_tokens,
            bos_token_id=None,
        )
    )
    with (
        torch.no_grad()
    ):  # channel 0 is large in every state, and speaks against the end token alone
        model.model.embed_tokens.weight[:, 0] = 0.2
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[-1] = 0.0
        model.lm_head.weight[-1, 0] = -100.0
    model.save_pretrained(folder)
    drawn = torch.randint(2, case.vocab - 1, (ROWS, case.prompt_tokens)).tolist()
    return [" ".join(f"w{i}" for i in ids) for ids in drawn]


def run_side(
    side: str, case: Case, folder: Path, arguments: argparse.Namespace, *, allocations: bool = False
) -> dict[str, Any]:
    """The figures of one process."""
    threads = str(arguments.threads)
    steps = 1 if allocations else arguments.steps
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(Path(__file__).with_name("step_sides.py")), side]
        command += ["--case", json.dumps(asdict(case)), "--folder", str(folder), "--out", out]
        command += ["--threads", threads, "--warmup", str(arguments.warmup), "--steps", str(steps)]
        command += ["--allocations"] if allocations else []
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads((Path(out) / "figures.json").read_text())


# ---- figures -------------------------------------------------------------------------------------


def measure(name: str, sides: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each side of one case."""
    case = CASES[name]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folder(case, folder)
        for number in range(arguments.repeats):
            for side in sides if number % 2 == 0 else sides[::-1]:
                runs[side].append(run_side(side, case, folder, arguments))
        allocated = {
            side: run_side(side, case, folder, arguments, allocations=True)["allocated_peak_mib"]
            for side in sides
        }
    rows = [row_of(name, side, runs[side], allocated[side]) for side in sides]
    check_same_work(case, rows)
    return rows


def row_of(
    name: str, side: str, runs: list[dict[str, Any]], allocated_mib: float
) -> dict[str, Any]:
    seconds = [s for run in runs for s in run["step_seconds"]]
    cpu_seconds = [s for run in runs for s in run["step_cpu_seconds"]]
    resident = [run["resident_peak_mib"] for run in runs]
    phases = runs[0]["phase_seconds"]
    return {
        "case": name,
        "side": side,
        "steps_per_second": 1 / statistics.median(seconds),
        "step_seconds": statistics.median(seconds),
        "step_seconds_range": [min(seconds), max(seconds)],
        "step_cpu_seconds": statistics.median(cpu_seconds),
        "step_cpu_seconds_range": [min(cpu_seconds), max(cpu_seconds)],
        "phase_seconds": {
            phase: statistics.median(run["phase_seconds"][phase] for run in runs)
            for phase in phases
        },
        "resident_mib": statistics.median(resident),
        "resident_mib_range": [min(resident), max(resident)],
        "allocated_mib": allocated_mib,
        "tokens": statistics.median(run["tokens"] for run in runs),
        "learnable_frac": min(run["learnable_frac"] for run in runs),
    }


def check_same_work(case: Case, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wanted, found = case.sequences * case.completion_tokens, row["tokens"]
        if case.mean_tokens is None and case.model is None:
            assert found == wanted, f"{row['side']}: {found} tokens a step, not {wanted}"


def compared(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over TRL's; time the other way round, as speed."""
    ours, trl = ({r["side"]: r for r in rows}[side] for side in ("exgrpo_fast", "trl"))
    return {
        "speed": trl["step_seconds"] / ours["step_seconds"],
        "speed_by_cpu_seconds": trl["step_cpu_seconds"] / ours["step_cpu_seconds"],
        "resident": ours["resident_mib"] / trl["resident_mib"],
        "allocated": ours["allocated_mib"] / trl["allocated_mib"],
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        low, high = row["step_seconds_range"]
        phases = " ".join(f"{name} {value:.2f}" for name, value in row["phase_seconds"].items())
        print(
            f"{row['case']:14} {row['side']:12} {row['step_seconds']:7.2f} s [{low:.2f}, {high:.2f}]"
            f" cpu {row['step_cpu_seconds']:7.2f} resident {row['resident_mib']:6.0f} MiB"
            f" allocated {row['allocated_mib']:6.0f} MiB | {phases}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1, help="steps of a run that do not count")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run that count")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides = ["exgrpo_fast", "trl"]
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: our side alone")
        sides = sides[:1]
    results: dict[str, Any] = {
        "bench": "step",
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "transformers": installed("transformers"),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "load_average": [round(os.getloadavg()[1], 2)],
        "cases": {name: asdict(CASES[name]) for name in arguments.cases},
        "ratios": {},
        "rows": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        rows = measure(name, sides, arguments)
        print_rows(rows)
        results["rows"] += rows
        if len(rows) == 2:
            results["ratios"][name] = compared(rows)
            print("  ours over TRL:", {k: round(v, 2) for k, v in compared(rows).items()})
        results["load_average"].append(round(os.getloadavg()[1], 2))
        (arguments.out / "step.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
