"""A policy sharded by FSDP2: this rank's shard of the weights and its share of the packs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from exgrpo_fast.core.dtensor import full_tensor
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.model.agreement import FINE, NOT_FINITE, PassCheck
from exgrpo_fast.model.fsdp import CAN_FORGET, GatheredHead, forget_pass, reshard, shard
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.model.packing import AssignedPack, Pack
from exgrpo_fast.model.policy import Head, Policy

T = TypeVar("T")


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
        self._gathered = GatheredHead(super()._head_layer(), dtype)

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
            reshard(self.model.base_model)
        except BaseException:
            forget_pass(self.model.base_model)
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
