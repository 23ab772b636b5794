"""The policy of one process among several: a part of the weights, a share of the packs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from exgrpo_fast.core.dtensor import whole
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.model.assign_packs import deal
from exgrpo_fast.model.fsdp import GatheredHead, reshard, shard
from exgrpo_fast.model.packing import Dealt, Pack
from exgrpo_fast.model.policy import Head, Policy
from exgrpo_kernels import NonFiniteHidden


class ShardedPolicy(Policy):
    """Every pass, and every look at the weights, is one that all processes take part in."""

    def __init__(
        self, model: PreTrainedModel, *, mesh: DeviceMesh, processes: Processes, **settings: Any
    ) -> None:
        """`model`: whole, and the same on every process; `settings`: those of a Policy.

        Nothing is sent here: each process keeps its part and drops the rest.
        """
        dtype = settings.get("compute_dtype", torch.float32)
        shard(model, mesh, compute_dtype=dtype)
        super().__init__(model, device=processes.device, **settings)
        self.processes = processes
        self._gathered = GatheredHead(super()._head_layer(), dtype)

    def deal(self, packs: Sequence[Pack]) -> list[Dealt]:
        place = self.processes.place
        return deal(packs, rank=place.rank, count=place.count)

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, the head is put together; on the way out its gradient is handed back."""
        with_gradient = torch.is_grad_enabled()
        self._gathered.gather(with_gradient=with_gradient)
        try:
            yield
            if with_gradient:
                self._gathered.scatter()
        finally:
            self._gathered.release()
            reshard(self.model.base_model)

    def hidden_states(self, packed: Pack) -> Tensor:
        """Pack -> [N, D]. On CPUs a NonFiniteHidden of one process is one of all of them."""
        hidden_ND = super().hidden_states(packed)
        if self.device.type == "cpu" and torch.is_grad_enabled():
            if self.processes.any(not bool(hidden_ND.isfinite().all())):
                raise NonFiniteHidden("hidden must be finite in every process")
        return hidden_ND

    def head_for(self, hidden_ND: Tensor) -> Head:
        gathered, softcap = self._gathered, self.head.softcap
        assert gathered.weight_VD is not None, "a pass outside of `passes`"
        return Head(gathered.weight_VD, None, softcap)

    def head_gradient(self) -> contextlib.AbstractContextManager[Tensor | None]:
        return contextlib.nullcontext(self._gathered.gradient_VD)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole, one after the other, on every process."""
        for name, weight in super().named_weights():
            yield name, whole(weight)
