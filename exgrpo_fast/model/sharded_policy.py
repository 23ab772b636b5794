"""A policy sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`): this rank's shard of the weights
and its share of the packs.

Each layer is all-gathered for its forward and backward pass and freed again; its gradient is
reduce-scattered. Sums, not means: the weights of the loss are normalised over the whole batch.

The head is part of no forward pass (the fused loss takes its weight), so it is gathered here, once
for all passes of an update, and accumulates their gradient in float32 before that is
reduce-scattered. A tied embedding is the same parameter: its shards receive both gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from exgrpo_fast.core.dtensor import full_tensor
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.model.agreement import FINE, NOT_FINITE, PassCheck
from exgrpo_fast.model.folder_reading import PolicyError
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.model.packing import AssignedPack, Pack
from exgrpo_fast.model.policy import Head, Policy

T = TypeVar("T")
CAN_FORGET = hasattr(FSDPModule, "reset_iter_state")  # from torch 2.13 on


class ShardedPolicy(Policy):
    """Every pass, and every access to whole weights, is a collective of all ranks."""

    def __init__(
        self, model: PreTrainedModel, *, mesh: DeviceMesh, processes: Processes, **settings: Any
    ) -> None:
        """`model`: complete and equal on every rank; `settings`: those of a Policy.

        No communication: each rank keeps its shard and drops the rest.
        """
        dtype = settings.get("compute_dtype", torch.float32)
        self._check = PassCheck(processes)
        shard(model, mesh, self._check, compute_dtype=dtype)
        super().__init__(model, device=processes.device, **settings)
        self.processes = processes
        self._gathered = GatheredHead(model.get_output_embeddings(), dtype)
        self._body: Any = model.base_model

    def freeze(self) -> None:
        """Train nothing; layers are gathered in the compute dtype as it is."""
        self.model.requires_grad_(False)

    def assign_packs(self, packs: Sequence[Pack]) -> list[AssignedPack]:
        place = self.processes.place
        return assign_packs(packs, rank=place.rank, count=place.count)

    def all_or_none(self, passes: Callable[[], T]) -> T:
        """What `passes` returns, on all ranks; torch.OutOfMemoryError on all where one has run out."""
        try:
            return self._check.all_or_none(passes)
        except torch.OutOfMemoryError:
            if CAN_FORGET:
                raise
            raise OutOfMemory(
                "out of memory: several processes repeat a pass from torch 2.13 on; lower "
                "train.max_tokens_per_microbatch",
                "",
            ) from None

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, the head is gathered; on exit its gradient is reduced and scattered."""
        with_gradient = torch.is_grad_enabled()
        self._check()
        self._gathered.gather(with_gradient=with_gradient)
        try:
            yield
            self._check()
            if with_gradient:
                self._gathered.scatter()
            self._body.reshard()  # what a pass without gradients left gathered
        except BaseException:
            forget_pass(self._body)
            raise
        finally:
            self._gathered.release()

    def hidden_states(self, packed: Pack) -> Tensor:
        """Pack -> [N, D]. On CPUs a NonFiniteHidden on one rank is raised on all."""
        hidden_ND = super().hidden_states(packed)
        if self.device.type == "cpu" and torch.is_grad_enabled():
            self._check(FINE if bool(hidden_ND.isfinite().all()) else NOT_FINITE)
        return hidden_ND

    def head_for(self, hidden_ND: Tensor) -> Head:
        gathered, softcap = self._gathered, self.head.softcap
        assert gathered.weight_VD is not None, "a pass outside of `passes`"
        return Head(gathered.weight_VD, None, softcap)

    @contextlib.contextmanager
    def head_gradient(self) -> Iterator[Tensor | None]:
        """Where an update is one pack, the sum is reduced and scattered before the backward pass."""
        yield self._gathered.gradient_VD
        if self.sizes.one_pack:
            self._check()
            self._gathered.scatter()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Gathered one after the other, on every rank."""
        for name, weight in super().named_weights():
            yield name, full_tensor(weight)


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

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer = layer
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


def forget_pass(module: nn.Module) -> None:
    """After a pass that all ranks have left in its middle: drop all gradients and free what is
    gathered. FSDP2 itself would keep the gradients of a layer whose backward pass had begun."""
    for parameter in module.parameters():  # of a gathered layer these are the gathered ones
        parameter.grad = None
    assert isinstance(module, FSDPModule)
    if CAN_FORGET:
        if module._get_fsdp_state()._is_root is not None:  # else no pass has begun
            module.reset_iter_state()
    else:
        module.reshard()


def assign_packs(packs: Sequence[Pack], *, rank: int, count: int) -> list[AssignedPack]:
    """The packs of `rank` of `count`, largest first.

    The collectives of a sharded model are part of every pass, so all ranks make the same number of
    passes: a rank with fewer packs repeats the smallest one with `counts=False`.

    Every pack goes to the rank with the fewest read tokens so far (longest processing time
    first: Graham 1969 bounds the longest share by 4/3 of the best one).
    """
    shares: list[list[Pack]] = [[] for _ in range(count)]
    loads = [0] * count
    for pack in sorted(packs, key=lambda pack: -len(pack.input_ids)):
        least = loads.index(min(loads))
        shares[least].append(pack)
        loads[least] += len(pack.input_ids)
    num_passes = max(len(share) for share in shares)
    smallest = min(packs, key=lambda pack: len(pack.input_ids), default=None)
    own = [AssignedPack(pack, True) for pack in shares[rank]]
    if smallest is not None:
        own += [AssignedPack(smallest, False)] * (num_passes - len(own))
    return own
