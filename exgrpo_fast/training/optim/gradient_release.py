"""Gradient release: an update during which the gradients of all parameters never exist together.

The backward pass runs twice over the same graph. The first time each gradient leaves its norm behind
and is dropped as soon as it is finished. Then the norm of the whole gradient is known, as early as
in the usual update: an update that is refused ends here, and nothing has changed. The second time
each gradient is clipped and applied to its weight, and dropped.

    usual       forward, backward, norm, clip, step     gradients: all
    released    forward, backward, norm, backward       gradients: the head's, and one other

The head's gradient is made by the loss in the forward pass (`head_gradient.py`), and is kept until
the end. That of a tied head is finished when the embedding has added its part in the first pass;
the part comes again in the second, and is dropped.

Of a sharded model FSDP2 calls the same hooks with each rank's shard, once it has reduced and
scattered the gradients of a layer; it gathers the layers again for the second pass.

A graph does not outlive a change of the weights, so an update is one pack on each rank. A weight
that is needed once more after its gradient is finished raises autograd's error about a changed
variable (of a sharded model the gathered weights of a layer stay until it is through).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from exgrpo_fast.core.dtensor import local_shard, norm_over_ranks
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.training.optim.optimiser import Optimiser, UpdateOutcome


class HalfApplied(UserError):
    """Memory ran out between two weights: these must not be saved."""


class ReleasingOptimiser(Optimiser):
    """The same updates as `Optimiser`'s, each of one pack on each rank."""

    sums_packs = False

    def __init__(
        self,
        *arguments: Any,
        all_or_none: Callable[[Callable[[], None]], None] = lambda passes: passes(),
        **settings: Any,
    ) -> None:
        """`all_or_none`: the policy's, around the second pass; the others are those of `Optimiser`."""
        super().__init__(*arguments, **settings)
        self.all_or_none = all_or_none
        self._shard_of = dict(zip(self.parameters, self.shards, strict=True))
        self._loss: Tensor | None = None
        self._norms: dict[nn.Parameter, Tensor] = {}  # of this rank's shards

    def backward(self, loss: Tensor) -> None:
        """The first pass; `loss` keeps its graph until `step` or `discard`."""
        assert self._loss is None, "one pack is one update"
        self._loss = loss
        of_loss = self._with_gradient()

        def measure(parameter: nn.Parameter) -> None:
            assert parameter not in self._norms, "a gradient came in two parts"
            self._norms[parameter] = norm_of(parameter)
            if parameter not in of_loss:
                parameter.grad = None

        with self._when_finished(measure):
            loss.backward(retain_graph=True)
        self._norms |= {parameter: norm_of(parameter) for parameter in of_loss - self._norms.keys()}
        assert self._with_gradient() == of_loss, "a gradient was finished unnoticed"

    def step(self) -> UpdateOutcome:
        """Apply the gradient of the pack, in a second pass. HalfApplied where that does not fit."""
        norm_P = torch.stack([self._norms[p] for p in self.parameters if p in self._norms])
        norm = norm_over_ranks(torch.linalg.vector_norm(norm_P), self.parameters[0])
        outcome = self.check(float(norm))
        if outcome.skipped is None:
            try:
                with self.applying(outcome.lr):
                    self.all_or_none(lambda: self._second_pass(norm))
            except torch.OutOfMemoryError as error:
                raise HalfApplied(
                    f"out of memory in the second pass of train.gradient_release "
                    f"({str(error).partition('.')[0]}); the weights are half updated and are not "
                    f"saved: --resume auto goes on from the newest checkpoint; lower "
                    f"model.tile_tokens, or raise train.minibatches"
                ) from None
        self.discard()
        return outcome

    def _second_pass(self, norm: Tensor) -> None:
        assert self._loss is not None, "no pack came before"
        finished = {parameter: parameter.grad for parameter in self._with_gradient()}
        super().discard()  # their turn comes at the end

        def apply(parameter: nn.Parameter) -> None:
            if parameter not in finished:
                self._step_alone(parameter, parameter.grad, norm)
            parameter.grad = None

        with self._when_finished(apply):
            self._loss.backward()
        for parameter, gradient in finished.items():
            self._step_alone(parameter, gradient, norm)

    def _step_alone(self, parameter: nn.Parameter, gradient: Tensor | None, norm: Tensor) -> None:
        """The others have no gradient, and every kind of AdamW passes over those."""
        assert gradient is not None
        shard = self._shard_of[parameter]
        shard.grad = local_shard(gradient)
        nn.utils.clip_grads_with_norm_([shard], self.max_grad_norm, norm)
        self.adamw.step()
        increment_version(shard)  # autograd does not see what a Triton kernel writes
        shard.grad = None

    def discard(self) -> None:
        super().discard()
        self._loss = None
        self._norms = {}

    def _with_gradient(self) -> set[nn.Parameter]:
        return {parameter for parameter in self.parameters if parameter.grad is not None}

    @contextlib.contextmanager
    def _when_finished(self, heard: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """`heard` is called with each parameter as soon as a backward pass has its gradient."""
        hooks = [p.register_post_accumulate_grad_hook(heard) for p in self.parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def norm_of(parameter: nn.Parameter) -> Tensor:
    """Of the gradient of this rank's shard, in its dtype, as `clip_grad_norm_` takes it."""
    assert parameter.grad is not None
    return torch.linalg.vector_norm(local_shard(parameter.grad))
