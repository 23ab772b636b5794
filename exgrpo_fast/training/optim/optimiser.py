"""AdamW with its learning-rate schedules, and the guard that keeps a bad update away from the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exgrpo_fast.core.dtensor import full_tensor, local_shard
from exgrpo_fast.training.optim.adamw import (
    Kind,
    flatten,
    local_parameter,
    make_adamw,
    quantise_by_whole,
    repeatable,
    restore,
    set_learning_rate,
)

Schedule = Callable[[int], float]  # finished updates -> factor on the learning rate


def constant(num_updates: int) -> float:
    return 1.0


def linear_warmup(steps: int) -> Schedule:
    """Up to the full rate at update `steps`, then constant."""
    return lambda num_updates: min(1.0, (num_updates + 1) / max(steps, 1))


def warmup_then_decay(warmup: int, total: int) -> Schedule:
    """Up over `warmup` updates, full until half of `total`, then down to 0."""
    return lambda num_updates: min(
        (num_updates + 1) / warmup, 1.0, 2.0 * (1.0 - num_updates / total)
    )


@dataclass(frozen=True)
class UpdateOutcome:
    grad_norm: float
    lr: float
    skipped: str | None  # why the weights were left alone


class Optimiser:
    """AdamW (matrices decay, vectors do not); the rate of update i is lr x schedule(i).

    `step` clips the gradient to `max_grad_norm`; a non-finite norm, or one above `skip_grad_norm`,
    changes neither weights nor moments.
    """

    sums_packs = True  # an update may be of several

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float,
        kind: Kind = "adamw",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = constant,
        max_grad_norm: float = 1.0,
        skip_grad_norm: float = 500.0,
    ) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.skip_grad_norm = skip_grad_norm
        self.num_updates = 0
        self.kind: Kind = kind
        self.shards = [local_parameter(parameter) for parameter in self.parameters]
        self.adamw = make_adamw(kind, self.shards, lr=lr, betas=betas, weight_decay=weight_decay)
        whole_of = dict(zip(self.shards, self.parameters, strict=True))
        self.ordered = [whole_of[p] for group in self.adamw.param_groups for p in group["params"]]
        if kind == "adamw_8bit":
            quantise_by_whole(self.adamw, whole_of)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one pack's loss."""
        loss.backward()

    def step(self) -> UpdateOutcome:
        """Apply the accumulated gradients and clear them."""
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        outcome = self.check(norm)
        if outcome.skipped is None:
            with self.applying(outcome.lr):
                self.adamw.step()
        self.discard()
        return outcome

    def check(self, norm: float) -> UpdateOutcome:
        """What becomes of a gradient of this norm, before it is clipped."""
        skipped = None
        if not math.isfinite(norm):
            skipped = "update_not_finite"
        elif norm > self.skip_grad_norm:
            skipped = "update_gradient_too_large"
        return UpdateOutcome(norm, self.lr * self.schedule(self.num_updates), skipped)

    @contextlib.contextmanager
    def applying(self, lr: float) -> Iterator[None]:
        """Around the steps of AdamW that make one update."""
        set_learning_rate(self.adamw, lr)
        for parameter, own in zip(self.parameters, self.shards, strict=True):
            if own is not parameter and parameter.grad is not None:
                own.grad = local_shard(parameter.grad)
        with repeatable(self.adamw, self.num_updates, rank_of(self.parameters)):
            yield
        self.num_updates += 1

    def discard(self) -> None:
        """Drop the accumulated gradients; weights and moments stay as they are."""
        for parameter in (*self.parameters, *self.shards):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Of a sharded policy: a collective of all ranks."""
        state = self.adamw.state_dict()["state"]
        has_blocks = self.kind == "adamw_8bit"
        return {
            "num_updates": self.num_updates,
            "moments": flatten(state, self.ordered, has_blocks=has_blocks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        restore(self.adamw, state["moments"], self.ordered)


def rank_of(parameters: Sequence[nn.Parameter]) -> int:
    """0 where nothing is sharded."""
    meshes = (p.device_mesh for p in parameters if isinstance(p, DTensor))
    return next((mesh.get_local_rank() for mesh in meshes), 0)
