"""What glibc costs a run on a CPU: page faults and CPU seconds with its defaults and as the trainer sets it.

    python bench/cpu_memory.py [--model smollm2 --sequences 64 --tokens 64 --rounds 2]

    rollout     the transformers engine, 8 samples of each prompt; no completion ends early
    generate    `generate` of transformers, for the same prompts and lengths, one row a sample
    update      forward and backward of the same sequences by the fused loss

Each measurement is a separate process, side by side in every round. Times are CPU seconds, of user and
kernel apart: they hardly depend on what else the machine does. Page faults do not at all. Writes
cpu_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import machine

from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.build.quickstart.prepare import Example, imitate
from exgrpo_fast.core.allocator import keep_freed_memory
from exgrpo_fast.model.folder_reading import load_tokenizer, quiet_libraries
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.run.display import Screen

SAMPLES = 8  # of each prompt
NEVER = 2**30  # an end token that is never drawn


def make_prompts(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {i} + 5?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for i in range(count // SAMPLES)
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [tuple(prompt) for prompt in ids for _ in range(SAMPLES)]


def work_of(work: str, folder: str, sequences: int, tokens: int) -> Callable[[], object]:
    """The work, with everything loaded."""
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_model(folder)
    prompts = make_prompts(tokenizer, sequences)
    if work == "generate":
        model.eval()
        batch = tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in prompts]},
            padding_side="left",
            return_tensors="pt",
        )
        return lambda: model.generate(
            **batch, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
        )
    policy = Policy(model, max_tokens_per_microbatch=4096)
    if work == "rollout":
        engine = TransformersEngine(policy, eos_token_ids=[NEVER], pad_token_id=0)
        requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        return lambda: engine.generate(requests, Sampling(tokens))
    random = torch.Generator().manual_seed(0)
    examples = [
        Example(prompt, torch.randint(len(tokenizer), (tokens,), generator=random))
        for prompt in prompts
    ]
    return lambda: imitate(policy, examples)


def measure(work: str, folder: str, sequences: int, tokens: int) -> dict[str, float]:
    run = work_of(work, folder, sequences, tokens)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    user, kernel = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "cpu_seconds": round(user + kernel, 2),
        "kernel_seconds": round(kernel, 2),
        "wall_seconds": round(wall, 2),
        "page_faults": after.ru_minflt - before.ru_minflt,
        "tokens_per_cpu_second": round(sequences * tokens / (user + kernel), 1),
        "peak_gib": round(after.ru_maxrss / 2**20, 2),
    }


def in_a_process(arguments: argparse.Namespace, folder: str, work: str, keep: bool) -> Any:
    command = [sys.executable, __file__, "--model", folder, "--work", work]
    command += ["--sequences", str(arguments.sequences), "--tokens", str(arguments.tokens)]
    ended = subprocess.run(
        [*command, *(["--keep"] if keep else [])], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--works", nargs="*", default=["rollout", "generate", "update"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # of one measurement
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.work:
        assert not arguments.keep or keep_freed_memory()
        found = measure(arguments.work, arguments.model, arguments.sequences, arguments.tokens)
        print(json.dumps(found))
        return
    folder = model_folder(arguments.model, Screen())
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "model": arguments.model,
        "sequences": arguments.sequences,
        "tokens": arguments.tokens,
        "rows": [],
    }
    for number in range(arguments.rounds):
        for work in arguments.works:
            for keep in (False, True):
                row = in_a_process(arguments, folder, work, keep)
                side = "transformers" if work == "generate" else "exgrpo_fast"
                row = {"round": number, "work": work, "side": side, "keeps": keep, **row}
                results["rows"].append(row)
                print(row, flush=True)
    results["medians"] = {
        f"{work} {'kept' if keep else 'default'}": {
            name: statistics.median(
                row[name] for row in results["rows"] if (row["work"], row["keeps"]) == (work, keep)
            )
            for name in ("cpu_seconds", "kernel_seconds", "page_faults", "tokens_per_cpu_second")
        }
        for work in arguments.works
        for keep in (False, True)
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "cpu_memory.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
