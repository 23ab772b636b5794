"""The fused losses of a head that is sharded by rows of the vocabulary over several ranks.

Each rank holds some rows of the head and all hidden states. A token needs three sums over the
vocabulary, so the forward all-reduces [N] vectors only. With M the greatest lse of any rank and
S, E, T summed over the ranks,

    S = sum_r exp(lse_r - M)    E = sum_r exp(lse_r - M) (E_r[z] - M)    T = z_y - M, of y's owner
    lse = M + log S             entropy = log S - E / S                  logprob = T - log S

In the backward pass dz_j = c1 (1[j=y] - p_j) + c2 p_j (log p_j + H) + c3 p_j with these statistics.
A rank that does not hold y has the same gradient with c1 = 0 and c3 - c1 in place of c3, so the
passes over the chunks are those of `linear_logprob`, on either backend. dW is sharded like the
head; dX is summed over the ranks. The scheme is that of Megatron-LM (1909.08053, section 3), with
an entropy and without the logits.

Every rank calls with the same hidden states, targets and columns, and gets the same results.
Legend: N tokens, V vocabulary, P rows of the head that this rank holds, D hidden.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import (
    Gradients,
    HeadOptions,
    LinearHead,
    LinearLogprob,
    RowCoefficients,
    linear_head,
)
from exgrpo_kernels.linear_logprob import recompute_gradients, score_rows
from exgrpo_kernels.objective import (
    LossColumns,
    PolicyObjective,
    check_vector,
    loss_metrics,
    resolve_objective,
    row_scalars,
    token_losses,
)
from exgrpo_kernels.policy_loss import (
    PolicyLoss,
    WithGradients,
    check_main_grad,
    needs_gradients,
)

# In place of -inf: a shard of such columns alone would have no finite maximum. Their probabilities
# are 0 all the same.
LOWEST_BIAS = -1e30


@dataclass(frozen=True)
class VocabShard:
    """The shard of a linear head that this rank holds; `head.inputs.targets_N` count from its
    first row, and are 0 where another rank holds the target."""

    head: LinearHead
    is_owner_N: Tensor  # bool
    group: Any  # a process group; None is the default one

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def score(self, trained_N: Tensor | None) -> tuple[LinearLogprob, LinearLogprob]:
        """(N,) x 3 of the target over the whole vocabulary; and the same with the log-probability
        of the local target, as the gradient of this shard needs it."""
        local = score_rows(self.head)
        greatest = self.max(local.lse.clone())
        gap = local.lse - greatest
        share, mine = gap.exp(), self.is_owner_N
        local_target = local.logprobs + gap
        local_target = local_target.masked_fill(local_target <= LOWEST_BIAS / 2, -math.inf)
        parts = [
            share,
            share * (gap - local.entropy),
            torch.where(mine, local_target, 0.0),
            mine.to(share.dtype),
        ]
        total, moment, target, owners = self.sum(torch.stack(parts)).unbind()
        is_token = owners == 1
        allowed = is_token if trained_N is None else is_token | ~trained_N
        runtime.require(
            allowed.all(), "targets must be held by exactly one rank on every trained row"
        )
        log_total = total.log()
        logprobs = torch.where(is_token, target - log_total, 0.0)
        lse, entropy = greatest + log_total, log_total - moment / total
        return (
            LinearLogprob(logprobs, entropy, lse),
            LinearLogprob(local_target - log_total, entropy, lse),
        )

    def gradients(
        self,
        local: LinearLogprob,
        coefficients: RowCoefficients,
        needs: Sequence[bool],
        main_grad: Tensor | None = None,
    ) -> Gradients:
        """dX summed over the ranks; dW and db of the rows of this one."""
        c1, c2, c3 = coefficients
        of_others = torch.where(self.is_owner_N, 0.0, -c1)
        c3 = of_others if c3 is None else c3 + of_others
        own = RowCoefficients(torch.where(self.is_owner_N, c1, 0.0), c2, c3)
        dhidden, dweight, dbias = recompute_gradients(self.head, local, own, needs, main_grad)
        return None if dhidden is None else self.sum(dhidden), dweight, dbias


def vocab_shard(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    options: HeadOptions,
    *,
    vocab_start: int,
    group: Any,
    trained: Tensor | None = None,
) -> VocabShard:
    """Check everything that this rank can see; ValueError names the argument."""
    if not 0 <= vocab_start:
        raise ValueError(f"vocab_start must be >= 0, got {vocab_start}")
    if options.bias is not None:
        bias = options.bias.detach()
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32)).clamp(min=LOWEST_BIAS)
        options = replace(options, bias=bias)
    is_owner = (targets >= vocab_start) & (targets < vocab_start + len(weight_shard))
    local_targets = torch.where(is_owner, targets - vocab_start, 0)
    head = linear_head(hidden.detach(), weight_shard.detach(), local_targets, options)
    return VocabShard(head.with_checked_values(trained), is_owner, group)


# ---- autograd ------------------------------------------------------------------------------------


class VocabParallelLogprob(torch.autograd.Function):
    """(N, D), (P, D), (P,) -> (N,) x 3."""

    @staticmethod
    def forward(ctx, hidden, weight_shard, bias, shard: VocabShard):
        outputs, local = shard.score(None)
        ctx.shard = shard
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*local)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient, lse_gradient):
        local = LinearLogprob(*ctx.saved_tensors)
        if logprob_gradient is None:
            logprob_gradient = torch.zeros_like(local.logprobs)
        coefficients = RowCoefficients(
            logprob_gradient,
            None if entropy_gradient is None else -entropy_gradient,
            lse_gradient,
        )
        dhidden, dweight, dbias = ctx.shard.gradients(local, coefficients, ctx.needs_input_grad[:3])
        return dhidden, dweight, None if dbias is None else dbias.to(ctx.bias_dtype), None


# ---- public --------------------------------------------------------------------------------------


def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    group: Any = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> LinearLogprob:
    """(N, D), (P, D), (N,) -> (N,) float32 x 3: `linear_logprob` of a sharded head.

    weight_shard   rows `vocab_start` to `vocab_start + P` of the head, P >= 1; each row of the
                   vocabulary is held by one rank, and shards may differ in size
    bias           [P], of the same rows
    targets        int64, in [0, V) of the whole vocabulary
    group          a torch.distributed process group; None is the default one
    the others     as in `linear_logprob`

    hidden, targets and the upstream gradients must be the same on every rank: each gets the full
    dX, and dW and db of its own rows. Forward and backward are collective. Two
    all-reduces, of [N] and [4, N], in the forward, one of [N, D] in the backward.
    Errors: ValueError as in `linear_logprob`; a target that no rank holds raises on all of them.
    """
    options = HeadOptions(bias, temperature, softcap, logits_dtype, backend)
    shard = vocab_shard(
        hidden, weight_shard, targets, options, vocab_start=vocab_start, group=group
    )
    return LinearLogprob(*VocabParallelLogprob.apply(hidden, weight_shard, bias, shard))


def vocab_parallel_policy_loss(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    group: Any = None,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    kl_weights: Tensor | None = None,
    objective: PolicyObjective | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_main_grad: Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """(N, D), (P, D), (N,) -> float32 scalar: `linear_policy_loss` of a sharded head.

    weight_shard, vocab_start, group, bias, targets   as in `vocab_parallel_linear_logprob`
    weight_main_grad                                  float32 [P, D]
    the others                                        as in `linear_policy_loss`

    Loss, log-probabilities and metrics are the same on every rank; the gradients are made here, in
    the forward. All rows are scored before the first gradient, because a coefficient needs all
    shards: four GEMMs, and no communication inside the loop over chunks.
    There is no block-sparse backward.
    """
    objective = resolve_objective(objective)
    check_main_grad(weight_main_grad, weight_shard)
    check_vector("weights", weights, len(hidden), hidden.device)
    trained = weights.detach() != 0
    options = HeadOptions(bias, temperature, softcap, logits_dtype, backend)
    shard = vocab_shard(
        hidden,
        weight_shard,
        targets,
        options,
        vocab_start=vocab_start,
        group=group,
        trained=trained,
    )
    columns = LossColumns(
        advantages, behaviour_logprobs, weights, shaping, ref_logprobs, sequence_ids, kl_weights
    ).checked(objective, len(hidden), shard.head.dtype, hidden.device)
    needs = needs_gradients(hidden, weight_shard, bias)
    with torch.no_grad():
        (logprobs, entropy, _), local = shard.score(trained)
        losses = token_losses(objective, logprobs, entropy, columns)
        metrics = loss_metrics(objective, logprobs, entropy, columns, losses)
        result = PolicyLoss(losses.weighted.sum(), logprobs, entropy, losses.ratio, metrics)
        if not any(needs):
            return result
        coefficients = RowCoefficients(*row_scalars(objective, logprobs, entropy, columns))
        dhidden, dweight, dbias = shard.gradients(local, coefficients, needs, weight_main_grad)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    gradients = dhidden, dweight, dbias
    return result._replace(
        loss=WithGradients.apply(result.loss, hidden, weight_shard, bias, *gradients)
    )
