"""The fused linear policy loss: from hidden states to gradients, one chunk of logits at a time.

For a token-level loss the coefficients of a row are known as soon as its log-probability is, so
its gradients are made in the forward while the chunk is still there: three GEMMs and no logits
made twice. A sequence-level ratio couples rows; then all rows are scored first, the coefficients
follow, and a second pass makes the logits again: four GEMMs.

The loss itself is `objective.token_losses`; the row algebra is `linear_logprob`'s.
Legend: N tokens, V vocabulary, D hidden.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_logprob import (
    HeadGradients,
    LinearHead,
    LinearLogprob,
    RowCoefficients,
    Workspace,
    add_gradients_,
    linear_head,
    linear_logprob_reference,
    linear_statistics,
    recompute_gradients,
    row_statistics_,
    write_logits,
)
from exgrpo_kernels.objective import (
    LossColumns,
    PolicyObjective,
    check_vector,
    loss_columns,
    loss_metrics,
    resolve_objective,
    row_scalars,
    token_losses,
)

SPARSITIES = ("auto", "off")


class PolicyLoss(NamedTuple):
    """`loss` carries the gradient; logprobs, entropy, ratio [N] and the metrics are detached."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    ratio: Tensor
    metrics: dict[str, Tensor]

    def backward(self) -> None:
        """Short for `self.loss.backward()`."""
        self.loss.backward()


# ---- reference -----------------------------------------------------------------------------------


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    sparsity: str = "auto",
    backend: str = "auto",
    **columns,
) -> PolicyLoss:
    """(N, D), (V, D), (N,) -> scalar: the specification of `linear_policy_loss`, logits in full."""
    trained = weights != 0
    usable = trained | hidden.isfinite().all(-1)
    hidden = torch.where(usable[:, None], hidden, 0.0)
    targets = torch.where(trained | (targets >= 0) & (targets < len(weight)), targets, 0)
    if isinstance(temperature, Tensor):
        temperature = torch.where(trained, temperature, 1.0)
    out = linear_logprob_reference(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap
    )
    return policy_loss(out.logprobs, out.entropy, weights=weights, **columns)


# ---- chunked -------------------------------------------------------------------------------------

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def token_level_pass(
    head: LinearHead,
    objective: PolicyObjective,
    columns: LossColumns,
    needs: tuple[bool, bool, bool],
) -> tuple[LinearLogprob, Gradients]:
    """Statistics and gradients of every row in one pass over the chunks."""
    outputs = [head.hidden_ND.new_empty(len(head), dtype=head.dtype) for _ in range(3)]
    gradients = HeadGradients.like(head, needs)
    workspace = Workspace(head)
    for rows in workspace.chunks(len(head)):
        chunk = head.rows(rows)
        z = workspace.logits[: len(chunk)]
        write_logits(chunk, z)
        statistics = row_statistics_(chunk, workspace, z)
        for output, value in zip(
            outputs, (statistics.logprobs, statistics.entropy, statistics.lse), strict=True
        ):
            output[rows] = value
        c1, c2 = row_scalars(
            objective,
            statistics.logprobs,
            statistics.entropy,
            columns.rows(rows.start, rows.stop),
        )
        coefficients = RowCoefficients(c1, c2)
        add_gradients_(gradients, chunk, workspace, z, statistics, coefficients, rows)
    return LinearLogprob(*outputs), gradients.finish(head)


def two_phase_pass(
    head: LinearHead,
    objective: PolicyObjective,
    columns: LossColumns,
    needs: tuple[bool, bool, bool],
) -> tuple[LinearLogprob, Gradients]:
    """Score all rows, find all coefficients, then make each chunk of logits again."""
    outputs = linear_statistics(head)
    coefficients = RowCoefficients(
        *row_scalars(objective, outputs.logprobs, outputs.entropy, columns)
    )
    return outputs, recompute_gradients(head, outputs, coefficients, needs)


# ---- autograd ------------------------------------------------------------------------------------


class _WithGradients(torch.autograd.Function):
    """Gives a finished loss the gradients that were made beside it."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, gradients: Gradients):
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        # Multiplying by 1 would copy [V, D]; the host may look only where that costs no sync.
        is_one = runtime.can_read_values(upstream.device) and float(upstream) == 1.0
        scaled = (g if g is None or is_one else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return None, *scaled, None


# ---- public --------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor | None = None,
    *,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    objective: PolicyObjective | None = None,
) -> PolicyLoss:
    """(N,), (N,) -> scalar: the objective on vectors of log-probabilities, by plain autograd.

    The columns are those of `linear_policy_loss`. `entropy` may be None when the objective has no
    entropy term. For log-probabilities that come from elsewhere, or from `linear_logprob`.
    """
    objective = resolve_objective(objective)
    num_rows, device = logprobs.numel(), logprobs.device
    check_vector("logprobs", logprobs, num_rows, device)
    if entropy is not None:
        check_vector("entropy", entropy, num_rows, device)
    elif objective.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef={objective.entropy_coef} needs entropy of shape [{num_rows}]"
        )
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    logprobs = logprobs.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    columns = loss_columns(
        objective,
        num_rows,
        dtype,
        device,
        advantages=advantages,
        behaviour_logprobs=behaviour_logprobs,
        weights=weights,
        shaping=shaping,
        ref_logprobs=ref_logprobs,
        sequence_ids=sequence_ids,
    )
    losses = token_losses(objective, logprobs, entropy, columns)
    detached = logprobs.detach(), None if entropy is None else entropy.detach()
    metrics = loss_metrics(objective, *detached, columns, losses)
    return PolicyLoss(losses.weighted.sum(), *detached, losses.ratio.detach(), metrics)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    objective: PolicyObjective | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    sparsity: str = "auto",
    backend: str = "auto",
) -> PolicyLoss:
    """(N, D), (V, D), (N,) -> float32 scalar: sum of weights * loss over tokens, never [N, V].

    hidden, weight       bfloat16, float16, float32 or float64 (which makes everything float64)
    targets              int64 [N], the emitted tokens
    advantages           [N], the trajectory's advantage, repeated
    behaviour_logprobs   [N], log-probability under the policy taken to have produced the token
    weights              [N], mask x normaliser x correction; nothing is divided inside
    shaping              [N], 0: the surrogate; g > 0: w / (w + g) with the unclipped ratio w
    ref_logprobs         [N], needed when objective.kl_coef > 0
    sequence_ids         int64 [N] in [0, N), needed when objective.ratio_level is "sequence"
    objective            `PolicyObjective`, which gives the formulas and their papers
    bias, temperature, softcap, backend   as in `linear_logprob`
    sparsity             "auto" or "off"; both are dense

    A row of weight 0 contributes exactly 0, whatever its inputs hold; a target outside [0, V) is
    legal there and its logprob is reported as 0. The gradients are made here, in the forward, for
    those of hidden, weight, bias that require them; under torch.no_grad() none is made. The
    entropy and log-probabilities come back for all rows, for metrics and for later steps.
    N = 0 is legal: loss 0 and zero gradients.
    Errors: ValueError naming the argument, for shapes, dtypes, devices, settings; values (targets,
    temperature, shaping, sequence_ids) are checked on a CPU, and by device-side asserts on CUDA.
    """
    objective = resolve_objective(objective)
    if sparsity not in SPARSITIES:
        raise ValueError(f"sparsity must be one of {', '.join(SPARSITIES)}, got {sparsity!r}")
    runtime.resolve_backend(backend, hidden.device)
    check_vector("weights", weights, len(hidden), hidden.device)
    head = linear_head(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        trained=weights.detach() != 0,
    )
    columns = loss_columns(
        objective,
        len(head),
        head.dtype,
        hidden.device,
        advantages=advantages,
        behaviour_logprobs=behaviour_logprobs,
        weights=weights,
        shaping=shaping,
        ref_logprobs=ref_logprobs,
        sequence_ids=sequence_ids,
    )

    def wants(value: Tensor | None) -> bool:
        return torch.is_grad_enabled() and value is not None and value.requires_grad

    needs = wants(hidden), wants(weight), wants(bias)
    with torch.no_grad():
        gradients: Gradients | None = None
        if not any(needs):
            outputs = linear_statistics(head)
        elif objective.ratio_level == "sequence":
            outputs, gradients = two_phase_pass(head, objective, columns, needs)
        else:
            outputs, gradients = token_level_pass(head, objective, columns, needs)
        is_token = (targets >= 0) & (targets < len(weight))
        logprobs = torch.where(is_token, outputs.logprobs, 0.0)
        losses = token_losses(objective, logprobs, outputs.entropy, columns)
        metrics = loss_metrics(objective, logprobs, outputs.entropy, columns, losses)
        loss = losses.weighted.sum()
    if gradients is not None:
        loss = _WithGradients.apply(loss, hidden, weight, bias, gradients)
    return PolicyLoss(loss, logprobs, outputs.entropy, losses.ratio, metrics)
