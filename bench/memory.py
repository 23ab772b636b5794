"""Does the memory plan say what a run holds?

Real updates on random models of a few shapes, every byte as the allocator recorded it
(torch.profiler), beside the plan, which sees the config alone. `update` is a whole
`Learner.update`, the call `Trainer.step` makes, optimiser included (adamw_8bit apart, whose step is
compiled on a GPU alone: of released gradients the first of two passes); `scoring` is a `Policy.score`.

    python bench/memory.py [--out bench/results/cpu/memory.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from exgrpo_fast.config import validate
from exgrpo_fast.memory.planner import Machine, MemoryPlan, Planner
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.packing import sequences_of
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.gradient_release import ReleasingOptimiser
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_fast.training.preflight import worst_groups
from exgrpo_kernels import PolicyObjective

SHAPES: dict[str, Any] = {
    "qwen3 0.9M": Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    ),
    "qwen2 20M": Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama 80M": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
LORA = {"rank": 16, "alpha": 32.0}
# shape, response tokens, weights, compute, checkpointing, adapter, tokens of a tile
USUAL = [
    ("qwen3 0.9M", 128, "float32", "float32", True, None, 0),
    ("qwen3 0.9M", 128, "float32", "float32", False, None, 0),
    ("qwen3 0.9M", 128, "float32", "float32", True, None, 100),
    ("qwen2 20M", 256, "float32", "float32", True, None, 0),
    ("qwen2 20M", 256, "float32", "float32", False, None, 0),
    ("qwen2 20M", 256, "float32", "float32", True, None, 256),
    ("qwen2 20M", 256, "float32", "float32", False, None, 256),
    ("qwen2 20M", 256, "float32", "bfloat16", True, None, 0),
    ("qwen2 20M", 256, "bfloat16", "bfloat16", True, None, 0),
    ("qwen2 20M", 256, "bfloat16", "bfloat16", True, None, 256),
    ("qwen2 20M", 256, "float32", "float32", True, LORA, 0),
    ("qwen2 20M", 256, "bfloat16", "bfloat16", True, LORA, 0),
    ("qwen2 20M", 256, "bfloat16", "bfloat16", True, LORA, 256),
    ("llama 80M", 160, "float32", "float32", True, None, 0),
    ("llama 80M", 160, "float32", "float32", False, None, 0),
    ("llama 80M", 160, "float32", "float32", True, None, 128),
    ("llama 80M", 160, "bfloat16", "bfloat16", True, None, 0),
    ("llama 80M", 160, "bfloat16", "bfloat16", True, None, 128),
]
RELEASED = [
    ("qwen3 0.9M", 128, "float32", "float32", True, None, 0),
    ("qwen2 20M", 256, "float32", "float32", True, None, 0),
    ("qwen2 20M", 256, "float32", "float32", False, None, 0),
    ("qwen2 20M", 256, "bfloat16", "bfloat16", True, None, 256),
    ("llama 80M", 160, "float32", "float32", True, None, 0),
    ("llama 80M", 160, "float32", "bfloat16", True, None, 128),
    ("llama 80M", 160, "bfloat16", "bfloat16", True, None, 0),
]
# and whether gradients are released
CASES = [*((*case, False) for case in USUAL), *((*case, True) for case in RELEASED)]
PROMPT, SEQUENCES = 64, 4  # a pack: pairs behind one prompt


def measure(case: tuple[Any, ...]) -> dict[str, Any]:
    """Bytes of one case: measured, planned, and the relative error of the plan."""
    shape, response, weights, compute, checkpointing, lora, tile, releases = case
    tokens = pack_tokens(response)
    policy = Policy(
        make_model(shape, weights, lora),
        compute_dtype=getattr(torch, compute),
        gradient_checkpointing=checkpointing,
        tile_tokens=tile,
        max_tokens_per_microbatch=tokens,
    )
    kind = "adamw_8bit" if weights == "bfloat16" and lora is None else "adamw"
    make = ReleasingOptimiser if releases else Optimiser
    learner = make_learner(policy, make(policy.trainable_parameters, kind=kind, lr=1e-6), response)
    num_groups = SEQUENCES // 2 if releases else SEQUENCES  # one pack, or two
    # torchao's step, where it is not compiled, makes float32 copies of a weight that a GPU does not
    step = learner.rehearse if kind == "adamw_8bit" else learner.update
    found = peaks(learner, step, num_groups, response)
    resident = sum(p.nbytes for p in policy.model.parameters()) + state_bytes(learner)
    model = {
        "weights": weights,
        "dtype": compute,
        "gradient_checkpointing": checkpointing,
        "lora": lora,
        "tile_tokens": tile,
    }
    planned = plan_of(shape, response, model, {"optimizer": kind, "gradient_release": releases})
    return {
        "model": shape,
        "tokens": tokens,
        "weights": weights,
        "compute": compute,
        "checkpointing": checkpointing,
        "lora": lora is not None,
        "tile": tile,
        "gradient_release": releases,
        "optimizer": kind,
        **beside(found, resident, planned),
    }


# --- the same for one process of several (memory_sharded.py) --------------------------------------


def pack_tokens(response: int) -> int:
    return SEQUENCES // 2 * (PROMPT + 2 * (response - 1))


def make_model(shape: str, weights: str, lora: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=getattr(torch, weights))
    if lora is not None:
        add_adapter(model, **lora)
    return model


def make_learner(policy: Policy, optimiser: Optimiser, response: int) -> Learner:
    return Learner(
        policy,
        optimiser,
        weights=WeightRule("constant", response),
    )


def peaks(
    learner: Learner, step: Callable[..., object], num_groups: int, response: int
) -> dict[str, int]:
    """Bytes of an update by `step` and of a scoring pass over pairs of the longest responses."""
    policy, objective = learner.policy, PolicyObjective()
    groups = worst_groups(
        num_groups,
        2,
        prompt_tokens=PROMPT,
        completion_tokens=response,
        vocabulary=policy.model.config.vocab_size,
    )
    prompts, responses = sequences_of([t for group in groups for t in group.trajectories])
    learner.update(groups, objective)  # the optimiser makes its states here
    return {
        "update": peak_bytes(lambda: step(groups, objective)),
        "scoring": peak_bytes(lambda: policy.score(prompts, responses)),
    }


def plan_of(
    shape: str,
    response: int,
    model: dict[str, Any],
    train: dict[str, Any],
    processes: int = 1,
) -> MemoryPlan:
    """`model`, `train`: keys of the config."""
    config = validate(
        {
            "model": model,
            "data": {"max_prompt_tokens": PROMPT},
            "rollout": {
                "prompts_per_step": SEQUENCES // 2,
                "group_size": 2,
                "max_completion_tokens": response - 1,  # the last token is not read
            },
            "train": {"max_tokens_per_microbatch": pack_tokens(response), **train},
            "replay": {"enabled": False},
        }
    )
    return Planner(SHAPES[shape], Machine("cpu", None, "vllm_server", processes)).plan(config)


def beside(found: dict[str, int], resident: int, made: MemoryPlan) -> dict[str, float]:
    """MiB as measured and as planned, what stays apart from what comes and goes."""
    held = made.states.resident
    planned = {name: made.totals[name] - held for name in found}
    return {
        "resident_mib": round(resident / 2**20, 3),
        "resident_planned_mib": round(held / 2**20, 3),
        **{f"{name}_mib": round(value / 2**20, 3) for name, value in found.items()},
        **{f"{name}_planned_mib": round(value / 2**20, 3) for name, value in planned.items()},
        "resident_error": error(held, resident),
        "update_error": error(planned["update"], found["update"]),
        "scoring_error": error(planned["scoring"], found["scoring"]),
        "peak_error": error(made.totals["update"], resident + found["update"]),
    }


def error(planned: float, measured: float) -> float:
    return round(planned / measured - 1, 4)


def state_bytes(learner: Learner) -> int:
    def size(value: Any) -> int:
        if isinstance(value, dict):
            return sum(size(inner) for inner in value.values())
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

    return size(learner.optimiser.state_dict()["moments"])


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` had allocated at a time, above what was there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def write(rows: list[dict[str, Any]], out: str) -> None:
    names = ("resident_error", "update_error", "scoring_error", "peak_error")
    result = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "worst": {name: max(abs(row[name]) for row in rows) for name in names},
        "rows": rows,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["worst"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results/cpu/memory.json")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(json.dumps(rows[-1]), flush=True)
    write(rows, arguments.out)


if __name__ == "__main__":
    main()
