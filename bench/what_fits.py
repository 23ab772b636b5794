"""The largest model that the memory plan admits on each card, by kind of training. Nothing is run.

    python bench/what_fits.py [--out bench/results/what_fits.json]

Shapes are Qwen2.5's. One GPU holds everything, vLLM's engine included: 8 completions of up to
2,048 tokens a question, prompts of up to 1,024, packs and tiles as `auto` chooses them.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from transformers import Qwen2Config

from exgrpo_fast.config import load_config
from exgrpo_fast.memory.planner import GIB, Machine, Planner

CARDS_GB = (8, 16, 24, 48, 80)
# size: hidden, intermediate, layers, heads, key heads, tied head
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
}
LORA = {"model.lora.rank": "32", "model.lora.alpha": "64", "model.weights": "bfloat16"}
KINDS = {
    "full, float32 weights, AdamW": {"model.weights": "float32"},
    "full, bfloat16 weights, 8-bit moments": {
        "model.weights": "bfloat16",
        "train.optimizer": "adamw_8bit",
        "train.gradient_release": "true",
        "train.minibatches": "8",
        "rollout.prompts_per_step": "8",
    },
    "LoRA, rank 32": LORA,
    "QLoRA, rank 32": LORA | {"model.quantization": "nf4"},
}


def model_config(size: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, key_heads, tied = SHAPES[size]
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def machine_of(card_gb: int) -> Machine:
    return Machine("cuda", card_gb * GIB, "vllm")


def fits(planner: Planner, keys: dict[str, str]) -> bool:
    pairs = {
        "model.name": "model",
        "data.train": "train.jsonl",
        "rollout.max_completion_tokens": "2048",
        "data.max_prompt_tokens": "1024",
        "algorithm.kl.coef": "0",
        **keys,
    }
    return planner.plan(load_config("dapo", list(pairs.items()))).fits


def largest_models(planners: dict[str, Planner], keys: dict[str, str]) -> dict[str, str | None]:
    """'24 GB' -> the largest size that fits; None where the smallest does not."""
    sizes, found = list(SHAPES), {}
    num_fitting = 0  # what fits a card fits every larger one, so the search goes on from there
    for card in CARDS_GB:
        while num_fitting < len(sizes):
            planner = planners[sizes[num_fitting]]
            planner.machine = machine_of(card)  # traced passes do not depend on it
            if not fits(planner, keys):
                break
            num_fitting += 1
        found[f"{card} GB"] = sizes[num_fitting - 1] if num_fitting else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/what_fits.json"))
    arguments = parser.parse_args()
    planners = {size: Planner(model_config(size), machine_of(80)) for size in SHAPES}
    rows = []
    for kind, keys in KINDS.items():
        rows.append({"kind": kind, **largest_models(planners, keys)})
        print(json.dumps(rows[-1]), flush=True)
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
