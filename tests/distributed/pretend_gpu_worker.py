"""One process of several with a pretend GPU: `python pretend_gpu_worker.py RANK COUNT STORE`.

Two updates of a sharded policy, the first beside that of a policy on this process's CPU alone: AdamW
divides the rounding of gradients near zero by their own size, so the second starts from other weights.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
from interpreter import install_bfloat16_rounding
from learner_worker import furthest, make_groups, make_learner, make_model
from pretend_gpu.machine import pretend_gpu

from exgrpo_fast.core.process_group import Processes, joined, mesh_of
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_kernels import PolicyObjective

SETTINGS = {"max_tokens_per_microbatch": 60, "temperature": 0.9, "gradient_checkpointing": True}


def compare(processes: Processes, dtype: torch.dtype) -> dict[str, Any]:
    """Gap of the losses, of gradients as a share of the greatest, and the devices of the shards."""
    model = make_model(tied=True)
    settings: dict[str, Any] = {**SETTINGS, "compute_dtype": dtype}
    alone = Policy(copy.deepcopy(model), **settings)
    # FSDP2 moves the weights itself by assigning `.data`, which core tensors of two types do not take
    together = ShardedPolicy(
        model.to("cuda"), mesh=mesh_of(processes), processes=processes, **settings
    )
    losses, gradients = [], []
    for policy in (together, alone):
        learner, recording = make_learner(policy)
        reports = [
            learner.update(make_groups(step), PolicyObjective(1.0, None)) for step in range(2)
        ]
        losses.append(reports[0].losses[0])
        gradients.append({name: grad.cpu() for name, grad in recording.found[0].items()})
    devices = {str(p.device) for p in together.model.parameters()}
    return {
        "losses": abs(losses[0] - losses[1]),
        "gradients": furthest(*gradients),
        "devices": sorted(devices),
    }


def main() -> None:
    rank, count, store = sys.argv[1:4]
    torch.set_num_threads(1)
    install_bfloat16_rounding()
    place = RankInfo(int(rank), int(count), int(rank))
    with pretend_gpu(), joined(place, "cuda", deadline=300, store=f"file://{store}") as processes:
        found = {
            str(dtype).removeprefix("torch."): compare(processes, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
