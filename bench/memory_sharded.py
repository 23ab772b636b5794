"""Does the memory plan say what one process of several holds?

As bench/memory.py, for the first process of several: real updates on random models, every byte as
the allocator recorded it, beside the plan. The other processes are not there: torch's fake process
group stands in for them, which sends nothing and takes no memory of its own. Shapes, copies and
buffers of FSDP2 are the real ones; the numbers are not.

    python bench/memory_sharded.py [--out bench/results/cpu/memory_sharded.json]
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory import LORA, PROMPT, SEQUENCES, SHAPES, error, peak_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from exgrpo_fast.distributed import ShardedPolicy, mesh_of
from exgrpo_fast.learning.advantages import ADVANTAGES
from exgrpo_fast.learning.learner import Learner
from exgrpo_fast.learning.optim import Optimiser
from exgrpo_fast.memory.sharded import gathered, share, with_layers
from exgrpo_fast.memory.tracing import Setting, Tracer
from exgrpo_fast.memory.training import Head, scoring, states, update
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.preflight import worst_groups
from exgrpo_fast.processes import Processes, own_part
from exgrpo_fast.torchrun import Place
from exgrpo_kernels import PolicyObjective

COUNTS = (2, 8)
# shape, response tokens, compute, checkpointing, adapter, tokens of a tile
CASES: list[tuple[Any, ...]] = [
    ("qwen2 20M", 256, "float32", True, None, 0),
    ("qwen2 20M", 256, "float32", False, None, 0),
    ("qwen2 20M", 256, "float32", True, None, 256),
    ("qwen2 20M", 256, "bfloat16", True, None, 0),
    ("qwen2 20M", 256, "float32", True, LORA, 0),
    ("qwen2 20M", 256, "bfloat16", True, LORA, 0),
    ("llama 80M", 160, "float32", True, None, 0),
    ("llama 80M", 160, "float32", True, None, 128),
    ("llama 80M", 160, "bfloat16", True, None, 0),
]


def measure(case: tuple[Any, ...], processes: Processes) -> dict[str, Any]:
    """Bytes of one case: measured, planned, and the relative error of the plan."""
    shape, response, compute_name, checkpointing, lora, tile = case
    compute, config, count = getattr(torch, compute_name), SHAPES[shape], processes.count
    tokens = SEQUENCES // 2 * (PROMPT + 2 * (response - 1))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if lora is not None:
        add_adapter(model, **lora)
    policy = ShardedPolicy(
        model,
        mesh=mesh_of(processes),
        processes=processes,
        compute_dtype=compute,
        gradient_checkpointing=checkpointing,
        tile_tokens=tile,
        max_tokens_per_microbatch=tokens,
    )
    learner = Learner(
        policy,
        Optimiser(policy.trainable_parameters, lr=1e-6),
        advantage=ADVANTAGES["dr_grpo"],
        aggregation="constant",
        max_completion_tokens=response,
    )
    groups = worst_groups(
        2 * SEQUENCES * count,  # two packs each
        2,
        prompt_tokens=PROMPT,
        completion_tokens=response,
        vocabulary=config.vocab_size,
    )
    trajectories = [t for group in groups for t in group.trajectories]
    prompts = Ragged.of([t.question.prompt_ids for t in trajectories])
    responses = Ragged.of([t.token_ids for t in trajectories])
    learner.update(groups, PolicyObjective())  # the optimiser makes its states here
    found = {
        "update": peak_bytes(lambda: learner.update(groups, PolicyObjective())),
        "scoring": peak_bytes(lambda: policy.score(prompts, responses)),
    }
    resident = sum(bytes_of(own_part(p)) for p in policy.model.parameters())
    moments = learner.optimiser.adamw.state.values()
    resident += sum(bytes_of(own_part(m)) for state in moments for m in state.values())
    held, planned = plan_of(case, tokens, count)
    return {
        "model": shape,
        "processes": count,
        "tokens": tokens,
        "compute": compute_name,
        "checkpointing": checkpointing,
        "lora": lora is not None,
        "tile": tile,
        "resident_mib": round(resident / 2**20, 3),
        "resident_planned_mib": round(held / 2**20, 3),
        **{f"{name}_mib": round(value / 2**20, 3) for name, value in found.items()},
        **{f"{name}_planned_mib": round(value / 2**20, 3) for name, value in planned.items()},
        "resident_error": error(held, resident),
        "update_error": error(planned["update"], found["update"]),
        "scoring_error": error(planned["scoring"], found["scoring"]),
        "peak_error": error(held + planned["update"], resident + found["update"]),
    }


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def plan_of(case: tuple[Any, ...], tokens: int, count: int) -> tuple[float, dict[str, float]]:
    """(bytes that stay, bytes of an update and of a scoring pass beside them)."""
    shape, _, compute_name, checkpointing, lora, tile = case
    compute, config = getattr(torch, compute_name), SHAPES[shape]
    passes = Tracer(config, Setting(compute, compute, checkpointing, lora, tile))(tokens)
    head = Head(config.vocab_size, config.hidden_size, is_trained=lora is None)
    same: dict[str, Any] = {"weights": compute, "compute": compute, "device": "cpu"}
    held = share(
        states(passes, weights=torch.float32, optimiser="adamw", references=0, is_nf4=False), count
    )
    whole = gathered(
        passes,
        head,
        layers=config.num_hidden_layers,
        is_tied=config.tie_word_embeddings,
        compute=compute,
    )
    passes, head = with_layers(passes, whole), head._replace(is_trained=False)
    of_update = update(passes, head, tokens=tokens, chunk_rows=tile or None, **same).peak
    return held.resident, {
        "update": held.gradients + whole.for_update + of_update,
        "scoring": whole.for_scoring + scoring(passes, head, tokens=tokens, **same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results/cpu/memory_sharded.json")
    arguments = parser.parse_args()
    rows = [row for count in COUNTS for row in measure_all(count)]
    names = ("resident_error", "update_error", "scoring_error", "peak_error")
    result = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "worst": {name: max(abs(row[name]) for row in rows) for name in names},
        "rows": rows,
    }
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["worst"]))


def measure_all(count: int) -> list[dict[str, Any]]:
    """Every case, in the first process of `count`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    rows = []
    for case in CASES:
        rows.append(measure(case, Processes(Place(0, count, 0))))
        print(json.dumps(rows[-1]), flush=True)
    dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
