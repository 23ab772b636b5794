"""Sharding of a model by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each layer is all-gathered for its forward and backward pass and freed again; its gradient is
reduce-scattered. Sums, not means: the weights of the loss are normalised over the whole batch.

The head is part of no forward pass (the fused loss takes its weight), so it is gathered here, once
for all passes of an update, and accumulates their gradient in float32 before that is
reduce-scattered. A tied embedding is the same parameter: its shards receive both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from exgrpo_fast.model.agreement import PassCheck
from exgrpo_fast.model.folder_reading import PolicyError


def shard(model: Any, mesh: DeviceMesh, check: PassCheck, *, compute_dtype: torch.dtype) -> None:
    """Shard the parameters of a transformers model over the ranks of `mesh`, in place.

    They are gathered in the compute dtype; gradients are summed in float32. `check` comes before
    each collective. PolicyError for a model whose layers are not where transformers has them.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise PolicyError(f"{model.config.model_type}: cannot be sharded, it has no `layers`")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise PolicyError(f"{model.config.model_type}: cannot be sharded, its head has a bias")
    tied_to = next(
        (m for m in model.base_model.modules() if getattr(m, "weight", None) is head.weight), None
    )
    gathered_dtype = None if compute_dtype == torch.float32 else compute_dtype
    policy = MixedPrecisionPolicy(gathered_dtype, torch.float32, cast_forward_inputs=False)
    for module in [*layers, model.base_model, *([head] if tied_to is None else [])]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        check.guard(module)
    if tied_to is not None:
        head.weight = tied_to.weight


class GatheredHead:
    """The gathered weight of the head and, where it is trained, its gradient."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer: Any = layer
        self.dtype = dtype
        self.weight_VD: Tensor | None = None
        self.gradient_VD: Tensor | None = None  # float32

    def gather(self, *, with_gradient: bool) -> None:
        with_gradient &= self.layer.weight.requires_grad
        weight_VD: Tensor = self.layer.weight.detach().to(self.dtype).full_tensor()
        self.weight_VD = weight_VD.requires_grad_(with_gradient)
        if with_gradient:
            self.gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)

    def scatter(self) -> None:
        """Move the gradient, summed over the ranks, to that of the parameter's shards."""
        parameter = self.layer.weight
        if self.gradient_VD is None:
            return
        summed = DTensor.from_local(self.gradient_VD, parameter.device_mesh, [Partial()])
        self.gradient_VD = None
        parted = summed.redistribute(placements=parameter.placements).to(parameter.dtype)
        parameter.grad = parted if parameter.grad is None else parameter.grad + parted

    def release(self) -> None:
        self.weight_VD = self.gradient_VD = None


def reshard(module: nn.Module) -> None:
    """Free the parameters that a pass without gradients left gathered."""
    assert isinstance(module, FSDPModule)
    module.reshard()


CAN_FORGET = hasattr(FSDPModule, "reset_iter_state")  # from torch 2.13 on


def forget_pass(module: nn.Module) -> None:
    """After a pass that all ranks have left in its middle: drop all gradients and free what is
    gathered. FSDP2 itself would keep the gradients of a layer whose backward pass had begun."""
    for parameter in module.parameters():  # of a gathered layer these are the gathered ones
        parameter.grad = None
    if CAN_FORGET:
        assert isinstance(module, FSDPModule)
        if module._get_fsdp_state()._is_root is not None:  # else no pass has begun
            module.reset_iter_state()
    else:
        reshard(module)
