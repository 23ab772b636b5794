"""On-policy distillation over the whole vocabulary: at every trained token the divergence between the
policy's distribution and a teacher's is added to the loss.

The sampled form, one log-probability of the teacher for each token, is an advantage:
`token_advantages.Distillation`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exgrpo_fast.model.packing import Pack
from exgrpo_fast.model.policy import Policy, inference
from exgrpo_kernels import PolicyLoss, linear_distillation_loss
from exgrpo_kernels.distillation_loss import Divergence


@dataclass(frozen=True)
class VocabularyDistillation:
    """loss + coef * sum of weights * D(policy, teacher), with the weights of the loss.

    `teacher`: frozen, on the policy's device, sharded over the same ranks, with a head of as many
    tokens. `mixture`: of the divergence jsd. Without `with_rewards` no token has an advantage.
    """

    teacher: Policy
    divergence: Divergence = "reverse"
    mixture: float = 0.5
    coef: float = 1.0
    with_rewards: bool = True

    @contextlib.contextmanager
    def passes(self) -> Iterator[None]:
        """Around the passes of an update, inside the policy's: the teacher's head is gathered once."""
        with contextlib.ExitStack() as stack:
            with torch.no_grad():
                stack.enter_context(self.teacher.passes())
            stack.enter_context(inference(self.teacher.model))
            yield

    @torch.no_grad()
    def hidden_states(self, packed: Pack) -> Tensor:
        """[N, E]. Before the policy's forward pass: what the teacher's needs is free again by then."""
        return self.teacher.hidden_states(packed)

    def add(
        self,
        loss: PolicyLoss,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teacher_hidden_NE: Tensor,
        *,
        weights: Tensor,
        weight_main_grad: Tensor | None,
        chunk_rows: int | None,
    ) -> PolicyLoss:
        """`loss` with the divergence in its value, and its mean over trained tokens in its metrics."""
        found = linear_distillation_loss(
            hidden_ND,
            weight_VD,
            teacher_hidden_NE,
            self.teacher.head_for(teacher_hidden_NE).weight,
            weights=self.coef * weights,
            divergence=self.divergence,
            mixture=self.mixture,
            temperature=self.teacher.temperature,
            weight_main_grad=weight_main_grad,
            chunk_rows=chunk_rows,
        )
        trained_N = weights != 0
        mean = (found.divergence * trained_N).sum() / trained_N.sum().clamp(min=1)
        metrics = loss.metrics | {"teacher_divergence": mean}
        return loss._replace(loss=loss.loss + found.loss, metrics=metrics)
