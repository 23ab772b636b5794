"""One of several processes whose optimiser steps on shards, beside one that steps on the whole.

write FOLDER   two updates, a checkpoint, two more; what the whole one has then
read FOLDER    the checkpoint of another number of processes, then the same two updates
train FOLDER   a model in bfloat16, beside a whole one
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from learner_worker import make_groups, make_model
from several_processes import met
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from exgrpo_fast.core.dtensor import full_tensor
from exgrpo_fast.core.process_group import Processes, host_mesh, mesh_of
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.run.checkpoint.format import Checkpoints, load_state
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim import optimiser as optimiser_module
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_kernels import PolicyObjective

# Shards of the first begin at blocks of 256 weights for any number of processes, of the second for 1
# and 2; the third is too small to be quantised, and leaves one of three processes without a row.
SHAPES = ((10, 512), (44, 128), (2, 5), (7,))


def draw(seed: int, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES]


def shards(tensors: list[Tensor], mesh: DeviceMesh | None) -> list[Any]:
    if mesh is None:
        return tensors
    return [distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in tensors]


def flash_adamw_of_cpus(kind: Any, parameters: list[Any], **settings: Any) -> Any:
    """flashoptim without its kernels: no residual, no quantised moments."""
    from flashoptim import FlashAdamW  # pyright: ignore[reportMissingImports]

    plain = {"master_weight_bits": None, "quantize": False, "fused": False}
    return FlashAdamW(parameters, **plain, **settings)


def make(kind: Any, mesh: DeviceMesh | None, weights: list[Tensor]) -> Optimiser:
    if kind == "flash_adamw":
        optimiser_module.make_adamw = flash_adamw_of_cpus
    parameters = [nn.Parameter(weight) for weight in shards(weights, mesh)]
    return Optimiser(parameters, kind=kind, lr=1e-3, max_grad_norm=1e9)


def update(optimiser: Optimiser, mesh: DeviceMesh | None, seed: int) -> None:
    gradients = shards(draw(seed, 0.01), mesh)
    for parameter, gradient in zip(optimiser.parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    assert optimiser.step().skipped is None


class Weights:
    """The model folder of a checkpoint."""

    def __init__(self, optimiser: Optimiser) -> None:
        self.optimiser = optimiser

    def tensors(self) -> dict[str, Tensor]:
        return {str(i): p.detach() for i, p in enumerate(self.optimiser.parameters)}

    def write(self, folder: Path, tensors: Any) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")


def weights_of(optimiser: Optimiser) -> list[list[float]]:
    return [full_tensor(p.detach()).flatten().tolist() for p in optimiser.parameters]


def work(processes: Processes, kind: str, what: str, folder: Path) -> dict[str, Any]:
    mesh = mesh_of(processes) if processes.count > 1 else None
    state = {"num_updates": 0}
    if what == "write":
        optimiser = make(kind, mesh, draw(0, 0.02))
        for seed in (1, 2):
            update(optimiser, mesh, seed)
        writer = CheckpointWriter(Checkpoints(folder), Weights(optimiser), processes=processes)
        writer.finish(2, {"learner": {"optimiser": optimiser.state_dict()}})
    else:
        from safetensors.torch import load_file

        saved = load_file(folder / "step_2" / "hf" / "model.safetensors")
        optimiser = make(kind, mesh, [saved[str(i)] for i in range(len(SHAPES))])
        state = load_state(folder / "step_2", mesh=host_mesh(processes))["learner"]["optimiser"]
        optimiser.load_state_dict(state)
    for seed in (3, 4):
        update(optimiser, mesh, seed)
    assert optimiser.num_updates == 4
    kinds = [
        type(p).__name__ if not isinstance(p, DTensor) else type(p.to_local()).__name__
        for entries in optimiser.adamw.state.values()
        for p in (entries["exp_avg"],)
    ]
    return {"weights": weights_of(optimiser), "kinds": kinds}


def train(processes: Processes, kind: Any) -> dict[str, Any]:
    """Figures of three updates: of the shards, and of the whole model."""
    model = make_model(tied=True).to(torch.bfloat16)
    alone = Policy(copy.deepcopy(model), max_tokens_per_microbatch=60)
    mesh = mesh_of(processes)
    together = ShardedPolicy(model, mesh=mesh, processes=processes, max_tokens_per_microbatch=60)
    found = []
    for policy in (together, alone):
        optimiser = Optimiser(policy.trainable_parameters, kind=kind, lr=1e-3)
        learner = Learner(policy, optimiser, weights=WeightRule("token_mean", 16))
        reports = [learner.update(make_groups(step), PolicyObjective(1.0)) for step in range(3)]
        weights = {n: w.float() for n, w in policy.named_weights()}
        found.append((reports, weights))
    (ours, our_weights), (expected, their_weights) = found
    return {
        "losses": [abs(a.loss - b.loss) for a, b in zip(ours, expected, strict=True)],
        "norms": [
            abs(a.grad_norms[0] / b.grad_norms[0] - 1) for a, b in zip(ours, expected, strict=True)
        ],
        "weights": max(float((our_weights[n] - w).abs().max()) for n, w in their_weights.items()),
        "dtypes": sorted({str(p.dtype) for p in together.model.parameters()}),
    }


if __name__ == "__main__":
    kind, what, *folder = sys.argv[4:]
    with met(sys.argv[1:4]) as processes:
        if what == "train":
            print(json.dumps(train(processes, kind)))
        else:
            print(json.dumps(work(processes, kind, what, Path(folder[0]))))
