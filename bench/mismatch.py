"""How far the log-probabilities of a rollout engine are from the trainer's, on a pretrained model.

    python bench/mismatch.py [--model smollm2 --sequences 64 --tokens 32]

Each engine completes the same prompts with the trainer's weights, and the trainer scores what was
drawn, both in float32 and both in bfloat16. A dtype is a process: vLLM has one engine in each. With
d = log pi_trainer - log pi_engine of a token the figures are the mean and the largest |d| and the
effective sample share (sum r)^2 / (N sum r^2) of the weights r = exp(d), over tokens, and over
sequences with r = exp(sum d). An engine that is not installed is left out. Writes mismatch.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu_memory import make_prompts
from loss import machine
from torch import Tensor

from exgrpo_fast.build.engines import build_engine, reserve_engine
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.build.pretrained import fetch_model
from exgrpo_fast.config import Config, validate
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.folder_reading import load_tokenizer, quiet_libraries
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.vllm.versions import find_vllm

ENGINES = ("vllm", "transformers")  # vLLM takes its memory first
DTYPES = ("float32", "bfloat16")


def sample_share(log_ratios: Tensor) -> float:
    """Of importance weights exp(d): 1 where all are equal, 1/N where one outweighs the others."""
    ratios = (log_ratios - log_ratios.max()).double().exp()
    return float(ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()))


def make_config(folder: str, engine: str, dtype: str, tokens: int) -> Config:
    return validate(
        {
            "model": {"name": folder, "dtype": dtype},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"engine": engine, "max_completion_tokens": tokens},
            "train": {"max_tokens_per_microbatch": 4096},
        }
    )


def measure(folder: str, dtype: str, sequences: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each engine."""
    tokenizer = load_tokenizer(folder)
    requests = [
        Request(prompt, seed) for seed, prompt in enumerate(make_prompts(tokenizer, sequences))
    ]
    policy, rows = None, []
    with ExitStack() as stack:
        for name in ENGINES:
            config = make_config(folder, name, dtype, tokens)
            try:
                reserved = stack.enter_context(
                    reserve_engine(config, folder, tokenizer, device="cpu")
                )
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            policy = policy or make_policy(config, folder, device="cpu")
            engine = build_engine(
                config, policy, tokenizer, reserved, prompt_ids=requests[0].prompt_ids
            )
            synced = engine.sync(0)
            drawn = engine.generate(requests, Sampling(tokens))
            completions = Ragged.of([c.token_ids for c in drawn])
            scored = policy.score(Ragged.of([r.prompt_ids for r in requests]), completions)
            difference = scored.logprobs.cpu() - torch.cat([c.logprobs for c in drawn])
            of_sequences = [part.sum() for part in difference.split(completions.lengths.tolist())]
            rows.append(
                {
                    "engine": name,
                    "dtype": dtype,
                    "tokens": len(difference),
                    "mean": float(difference.abs().mean()),
                    "max": float(difference.abs().max()),
                    "token_share": sample_share(difference),
                    "sequence_share": sample_share(torch.stack(of_sequences)),
                    "sync_gap": synced.get("sync_gap"),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    quiet_libraries()
    folder = fetch_model(arguments.model)
    sizes = (arguments.sequences, arguments.tokens)
    if arguments.dtype:
        print(json.dumps(measure(folder, arguments.dtype, *sizes)))
        return
    rows = []
    for dtype in DTYPES:
        command = [sys.executable, __file__, "--model", folder, "--dtype", dtype]
        command += ["--sequences", str(sizes[0]), "--tokens", str(sizes[1])]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows += json.loads(ended.stdout.splitlines()[-1])
        for row in rows[-len(ENGINES) :]:
            print(row, flush=True)
    vllm = find_vllm()
    results = {
        "bench": "mismatch",
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "transformers": transformers.__version__,
        "vllm": vllm.name if vllm else None,
        "model": arguments.model,
        "sequences": sizes[0],
        "longest_completion": sizes[1],
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "mismatch.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
