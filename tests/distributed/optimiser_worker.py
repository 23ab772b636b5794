"""One of several processes whose optimiser steps on shards, beside one that steps on the whole.

write FOLDER   two updates, a checkpoint, two more; the weights and the bits of the state then
read FOLDER    the checkpoint of another number of processes, then the same two updates
train FOLDER   a model in bfloat16, beside a whole one
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from interpreter import make_libdevice, prepare_interpreter
from learner_worker import make_groups, make_model
from pretend_gpu.machine import pretend_gpu
from several_processes import met
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from exgrpo_fast.core.dtensor import full_tensor
from exgrpo_fast.core.process_group import Processes, host_mesh, mesh_of
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.run.checkpoint.format import Checkpoints, load_state, split_tensors
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.adamw import Elements
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_kernels import PolicyObjective

# Shards of the first begin at blocks of 256 weights for any number of processes, of the second for 1
# and 2, and at groups of 32 for any. The third, too small for blocks, leaves one of three processes
# without a row; its groups and those of the last are not whole.
SHAPES = ((10, 512), (44, 128), (2, 5), (7,))
DEVICE_OF = {"flash_adamw": "cuda"}  # a pretend one: its kernels run in Triton's interpreter


def draw(seed: int, size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES]


def shards(tensors: list[Tensor], mesh: DeviceMesh | None) -> list[Any]:
    if mesh is None:
        return tensors
    return [distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in tensors]


def make(kind: Any, mesh: DeviceMesh | None, weights: list[Tensor]) -> Optimiser:
    dtype = torch.float32 if kind == "adamw" else torch.bfloat16
    weights = [weight.to(DEVICE_OF.get(kind, "cpu"), dtype) for weight in weights]
    parameters = [nn.Parameter(weight) for weight in shards(weights, mesh)]
    optimiser = Optimiser(parameters, kind=kind, lr=1e-3, max_grad_norm=1e9)
    if kind == "adamw_8bit":
        round_by_the_same_bits(optimiser)
    return optimiser


def round_by_the_same_bits(optimiser: Optimiser) -> None:
    """A weight is rounded by a number that does not depend on how many processes there are."""
    from torchao.optim import adam  # pyright: ignore[reportMissingImports]

    turns = itertools.count()

    def rounded(values: Tensor) -> Tensor:
        turn = next(turns) % len(SHAPES)
        parameter = optimiser.ordered[turn]
        generator = torch.Generator().manual_seed(len(SHAPES) * optimiser.num_updates + turn)
        bits = torch.randint(2**16, (parameter.numel(),), generator=generator, dtype=torch.int32)
        place = Elements.of(parameter)
        own = bits[place.first : place.first + place.count].view(values.shape)
        return ((values.view(torch.int32) + own) & ~0xFFFF).view(torch.float32).bfloat16()

    adam._fp32_to_bf16_sr = rounded


def update(optimiser: Optimiser, mesh: DeviceMesh | None, seed: int) -> None:
    like = optimiser.parameters[0]
    drawn = [gradient.to(like.device, like.dtype) for gradient in draw(seed, 0.01)]
    for parameter, gradient in zip(optimiser.parameters, shards(drawn, mesh), strict=True):
        parameter.grad = gradient
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


def whole(tensor: Tensor) -> Tensor:
    """Gathered, on the host; gloo gathers no int16."""
    if tensor.dtype == torch.int16:
        tensor = tensor.int()
    return full_tensor(tensor.detach()).cpu().contiguous()


def digests(optimiser: Optimiser) -> list[str]:
    """Of each parameter: its bits and those of its state."""
    _, tensors = split_tensors(optimiser.state_dict()["moments"])
    found = []
    for place, parameter in enumerate(optimiser.ordered):
        digest = hashlib.sha256()
        names = sorted(name for name in tensors if name.startswith(f"state.{place}."))
        for tensor in (parameter, *(tensors[name] for name in names)):
            digest.update(whole(tensor).view(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


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
    weights = [whole(parameter).float().flatten().tolist() for parameter in optimiser.ordered]
    return {"weights": weights, "digests": digests(optimiser), "kinds": kinds}


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


def main() -> None:
    arguments, (kind, what, *folder) = sys.argv[1:4], sys.argv[4:]
    device = DEVICE_OF.get(kind, "cpu")
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            from flashoptim import optimizers  # pyright: ignore[reportMissingImports]

            prepare_interpreter()
            optimizers.libdevice = make_libdevice()
            stack.enter_context(pretend_gpu())
        processes = stack.enter_context(met(arguments, device))
        if what == "train":
            print(json.dumps(train(processes, kind)))
        else:
            print(json.dumps(work(processes, kind, what, Path(folder[0]))))


if __name__ == "__main__":
    main()
