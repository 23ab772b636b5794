"""The plan of the models and packs that docs/memory.md holds against its goals. Nothing is run.

python bench/memory_goals.py [--out bench/results/memory_goals.json]
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from exgrpo_fast.config import Config, load_config
from exgrpo_fast.memory.planner import GIB, Machine, MemoryPlan, Planner

ALLOWED_GIB = 1.5  # for contexts, the libraries' workspaces and fragments
MODELS = {
    "1.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
LORA = {"model.lora.rank": "32", "model.lora.alpha": "64"}
EIGHT_BIT = {"train.optimizer": "adamw_8bit"}
# 8 responses of up to 1984 tokens, behind one prompt, are an update
RELEASE = {
    "train.gradient_release": "true",
    "rollout.prompts_per_step": "32",
    "train.minibatches": "32",
    "rollout.max_completion_tokens": "1984",
}
# model, tokens of a pack, of a tile, other keys
CASES: list[tuple[str, int, int, dict[str, str]]] = [
    *(("1.5B", 16384, tile, {}) for tile in (0, 4096, 2048, 1024)),
    ("1.5B", 16384, 1024, EIGHT_BIT),
    *(("7B", 16384, tile, {}) for tile in (0, 4096, 1024)),
    ("7B", 8192, 0, {}),
    ("7B", 16384, 4096, EIGHT_BIT),
    *(("1.5B", 16384, tile, RELEASE) for tile in (0, 4096, 1024)),
    *(("7B", 16384, tile, RELEASE) for tile in (0, 4096, 1024)),
    ("7B", 16384, 4096, RELEASE | EIGHT_BIT),
    *(("7B", 65536, tile, LORA) for tile in (0, 4096, 1024)),
    ("7B", 65536, 4096, LORA | {"model.offload_activations": "true"}),
]


def planned(planner: Planner, tokens: int, tile: int, keys: dict[str, str]) -> MemoryPlan:
    """Bfloat16 weights, no experience store; sequences of up to 16,384 tokens."""
    pairs = {
        "model.name": "model",
        "data.train": "train.jsonl",
        "model.weights": "bfloat16",
        "train.max_tokens_per_microbatch": str(tokens),
        "model.tile_tokens": str(tile),
        "rollout.max_completion_tokens": "4096",
        "algorithm.kl.coef": "0",
        **keys,
    }
    config: Config = load_config("grpo", list(pairs.items()))
    return planner.plan(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results/memory_goals.json")
    arguments = parser.parse_args()
    planners = {
        name: Planner(model, Machine("cuda", 80 * GIB, "vllm")) for name, model in MODELS.items()
    }
    rows = []
    for name, tokens, tile, keys in CASES:
        made = planned(planners[name], tokens, tile, keys)
        own = made.states.resident + made.states.gradients + made.update.peak
        row: dict[str, Any] = {
            "model": name,
            "pack": tokens,
            "tile": tile,
            "adapter": "model.lora.rank" in keys,
            "gradient_release": made.config.train.gradient_release,
            "optimizer": made.config.optimizer,
            "offload": made.config.model.offload_activations,
            "states_gib": gib(made.states.resident),
            "gradients_gib": gib(made.states.gradients),
            "forward_gib": gib(made.update.forward),
            "loss_gib": gib(made.update.loss),
            "backward_gib": gib(made.update.backward),
            "scoring_gib": gib(made.rows["forward pass, logits"]["scoring"]),
            "saved_mib_per_token": round(made.update.saved / tokens / 2**20, 4),
            "total_gib": gib(own + ALLOWED_GIB * GIB),
        }
        if made.engine is not None:
            kv_tokens = made.engine.kv_cache_bytes / made.bytes_per_token
            row |= {"kv_tokens_on_80_gib": round(kv_tokens), "vllm_sleeps": made.engine.sleeps}
        rows.append(row)
        print(json.dumps(row))
    result = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


def gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 2)


if __name__ == "__main__":
    main()
