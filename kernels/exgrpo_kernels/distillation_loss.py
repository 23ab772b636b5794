"""Distillation over the whole vocabulary from a teacher's hidden states, without [N, V] logits.

With p the policy and t the teacher at a row, both at the same temperature:

    reverse   KL(p || t)                                   dz_j = p_j ((log p_j - log t_j) - KL)
    forward   KL(t || p)                                   dz_j = p_j - t_j
    jsd       b KL(t || m) + (1 - b) KL(p || m),           dz_j = (1 - b) p_j ((log p_j - log m_j)
              m = (1 - b) p + b t                                 - KL(p || m))

b is `mixture`. On-policy distillation (generalised: 2306.13649) takes these on the policy's own
completions, as TRL's `DistillationTrainer` does (its beta 1 is reverse, 0 forward). Both logits exist
one chunk of rows at a time and the gradients are made in the forward: three products of the
policy's head and one of the teacher's.

Plain PyTorch on every device. A row kernel pays where its second sweep finds the row in the L2
cache; here it would have to find two (docs/losses.md).

Legend: N tokens, R rows of a chunk, V vocabulary, D hidden, E hidden of the teacher.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import (
    HeadGradients,
    HeadOptions,
    LinearHead,
    LogitGradient,
    compute_dtype,
    linear_head,
)
from exgrpo_kernels.linear_logprob import buffer_dtypes, chunks
from exgrpo_kernels.objective import check_vector
from exgrpo_kernels.policy_loss import WithGradients, check_main_grad, needs_gradients

Divergence = Literal["reverse", "forward", "jsd"]
DIVERGENCES = ("reverse", "forward", "jsd")
# [R, V] tensors that are alive at a time: logits, log-probabilities, gradient, one product.
BUFFERS = 6


class DistillationLoss(NamedTuple):
    """`loss` carries the gradient; the divergence of each row [N] is detached."""

    loss: Tensor
    divergence: Tensor


def row_divergences(
    log_p_RV: Tensor, log_t_RV: Tensor, divergence: Divergence, mixture: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities -> the divergence [R] and its gradient in the policy's logits [R, V]."""
    p_RV = log_p_RV.exp()
    if divergence == "forward":
        t_RV = log_t_RV.exp()
        return (t_RV * (log_t_RV - log_p_RV)).sum(-1), p_RV - t_RV
    if divergence == "reverse":
        gap_RV = log_p_RV - log_t_RV
        kl_R = (p_RV * gap_RV).sum(-1)
        return kl_R, p_RV * (gap_RV - kl_R[:, None])
    t_RV = log_t_RV.exp()
    log_m_RV = ((1.0 - mixture) * p_RV + mixture * t_RV).log()
    gap_RV = log_p_RV - log_m_RV
    kl_R = (p_RV * gap_RV).sum(-1)
    of_teacher_R = (t_RV * (log_t_RV - log_m_RV)).sum(-1)
    value_R = mixture * of_teacher_R + (1.0 - mixture) * kl_R
    return value_R, (1.0 - mixture) * p_RV * (gap_RV - kl_R[:, None])


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    weights: Tensor,
    divergence: Divergence = "reverse",
    mixture: float = 0.5,
    temperature: float = 1.0,
    weight_main_grad: Tensor | None = None,
    chunk_rows: int | None = None,
) -> DistillationLoss:
    """(N, D), (V, D), (N, E), (V, E) -> scalar: sum of weights * divergence, never [N, V].

    weights           [N], mask x normaliser; a row of weight 0 contributes exactly 0, whatever it holds
    divergence        "reverse", "forward" or "jsd"; `mixture` in (0, 1) is the teacher's share of m
    temperature       divides both logits; that of the rollouts, so that p is what was sampled from
    weight_main_grad  float32 [V, D]: dW is added to it here, and `weight` gets none from autograd;
                      the upstream gradient of the loss must then be 1
    chunk_rows        at most so many rows at a time; None: by the device

    Both heads have to give every token a probability above 0. Gradients reach hidden and weight.
    Statistics are float32, float64 when an input is.
    Errors: ValueError naming the argument; two vocabularies of different size are one.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not 0.0 < mixture < 1.0:
        raise ValueError(f"mixture must lie in (0, 1), got {mixture}")
    check_main_grad(weight_main_grad, weight)
    check_vector("weights", weights, len(hidden), hidden.device)
    if len(teacher_weight) != len(weight) or len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"teacher_hidden and teacher_weight must have {len(hidden)} rows and {len(weight)} "
            f"tokens, got {list(teacher_hidden.shape)} and {list(teacher_weight.shape)}"
        )
    trained = weights.detach() != 0
    no_target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    options = HeadOptions(temperature=temperature, backend="torch", chunk_rows=chunk_rows)
    policy, teacher = (
        linear_head(torch.where(trained[:, None], h.detach(), 0.0), w.detach(), no_target, options)
        for h, w in ((hidden, weight), (teacher_hidden, teacher_weight))
    )
    needs = [*needs_gradients(hidden, weight), False]
    with torch.no_grad():
        weights_N = weights.detach().to(policy.dtype)
        gradients = HeadGradients.like(policy, needs, weight_main_grad)
        value_N = _pass_over_chunks(policy, teacher, weights_N, divergence, mixture, gradients)
        loss = (weights_N * value_N).sum()
        made = gradients.finish(policy)
    if any(needs):
        needs[1] = needs[1] and weight_main_grad is None
        made = (g if needed else None for g, needed in zip(made, needs, strict=True))
        loss = WithGradients.apply(loss, hidden, weight, None, *made)
    return DistillationLoss(loss, value_N)


def _pass_over_chunks(
    policy: LinearHead,
    teacher: LinearHead,
    weights_N: Tensor,
    divergence: Divergence,
    mixture: float,
    gradients: HeadGradients,
) -> Tensor:
    """The divergence of every row; adds the gradients of all of them."""
    operands, tau = buffer_dtypes(policy)[1], policy.inputs.common_temperature
    row_bytes = BUFFERS * len(policy.weight_VD) * policy.dtype.itemsize
    size = runtime.chunk_rows(len(policy), row_bytes, weights_N.device)
    size = size if policy.chunk_rows is None else min(size, policy.chunk_rows)
    value_N = torch.zeros_like(weights_N)
    for rows in chunks(len(policy), size):
        log_p_RV, log_t_RV = (_log_probs(head.rows(rows)) for head in (policy, teacher))
        value_N[rows], dz_RV = row_divergences(log_p_RV, log_t_RV, divergence, mixture)
        dz_RV *= (weights_N[rows] / tau)[:, None]
        gradients.add(policy.rows(rows), LogitGradient(dz_RV.to(operands)), rows)
    return value_N


def _log_probs(head: LinearHead) -> Tensor:
    """[R, V] of a chunk, in the dtype of its statistics."""
    shape = len(head), len(head.weight_VD)
    logits_RV = torch.empty(shape, dtype=head.dtype, device=head.hidden_ND.device)
    runtime.logits_into(logits_RV, head.hidden_ND, head.weight_VD)
    return (logits_RV / head.inputs.common_temperature).log_softmax(-1)


def linear_distillation_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    weights: Tensor,
    divergence: Divergence = "reverse",
    mixture: float = 0.5,
    temperature: float = 1.0,
) -> DistillationLoss:
    """The specification of `linear_distillation_loss`, with both logits in full and autograd."""
    dtype = compute_dtype(hidden, weight)
    trained = (weights != 0)[:, None]

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.where(trained, hidden, 0.0).to(dtype) @ weight.to(dtype).t()
        return torch.log_softmax(logits / temperature, -1)

    log_p, log_t = log_probs(hidden, weight), log_probs(teacher_hidden, teacher_weight).detach()
    middle = ((1.0 - mixture) * log_p.exp() + mixture * log_t.exp()).log()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    value = {
        "reverse": lambda: kl(log_p, log_t),
        "forward": lambda: kl(log_t, log_p),
        "jsd": lambda: mixture * kl(log_t, middle) + (1.0 - mixture) * kl(log_p, middle),
    }[divergence]()
    return DistillationLoss((weights.to(dtype) * value).sum(), value.detach())
