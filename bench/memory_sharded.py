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
from typing import Any

import torch
import torch.distributed as dist
from memory import (
    LORA,
    SEQUENCES,
    beside,
    make_learner,
    make_model,
    pack_tokens,
    peaks,
    plan_of,
    write,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from exgrpo_fast.core.dtensor import local_shard
from exgrpo_fast.core.process_group import Processes, mesh_of
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.training.optim.optimiser import Optimiser

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
    shape, response, compute, checkpointing, lora, tile = case
    count, tokens = processes.count, pack_tokens(response)
    policy = ShardedPolicy(
        make_model(shape, "float32", lora),
        mesh=mesh_of(processes),
        processes=processes,
        compute_dtype=getattr(torch, compute),
        gradient_checkpointing=checkpointing,
        tile_tokens=tile,
        max_tokens_per_microbatch=tokens,
    )
    learner = make_learner(policy, Optimiser(policy.trainable_parameters, lr=1e-6), response)
    found = peaks(learner, learner.update, 2 * SEQUENCES * count, response)  # two packs each
    moments = [m for state in learner.optimiser.adamw.state.values() for m in state.values()]
    resident = sum(local_shard(t).nbytes for t in [*policy.model.parameters(), *moments])
    model = {
        "dtype": compute,
        "gradient_checkpointing": checkpointing,
        "lora": lora,
        "tile_tokens": tile,
    }
    planned = plan_of(shape, response, model, {}, processes=count)
    return {
        "model": shape,
        "processes": count,
        "tokens": tokens,
        "compute": compute,
        "checkpointing": checkpointing,
        "lora": lora is not None,
        "tile": tile,
        **beside(found, resident, planned),
    }


def measure_all(count: int) -> list[dict[str, Any]]:
    """Every case, in the first process of `count`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    rows = []
    for case in CASES:
        rows.append(measure(case, Processes(RankInfo(0, count, 0))))
        print(json.dumps(rows[-1]), flush=True)
    dist.destroy_process_group()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results/cpu/memory_sharded.json")
    arguments = parser.parse_args()
    write([row for count in COUNTS for row in measure_all(count)], arguments.out)


if __name__ == "__main__":
    main()
