"""The policy loss where the logits exist already: their gradient overwrites them.

Statistics, coefficients and gradient are those of the row kernels; no GEMM is made here.
Legend: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import (
    HEAD_DTYPES,
    ROW_SCHEMA,
    HeadOptions,
    RowInputs,
    compute_dtype,
    row_inputs,
)
from exgrpo_kernels.objective import (
    COLUMNS_SCHEMA,
    LossColumns,
    PolicyObjective,
    check_vector,
    resolve_objective,
)
from exgrpo_kernels.policy_loss import PolicyLoss, WithGradients, finished_loss, needs_gradients
from exgrpo_kernels.rowwise_torch import TorchRows

# ---- operator ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "exgrpo_kernels::policy_loss_from_logits_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {ROW_SCHEMA}, str backend, {COLUMNS_SCHEMA}, str objective) -> "
    "(Tensor, Tensor)",
)
def policy_loss_from_logits_operator(logits, *arguments):
    """logprobs, entropy; the gradient for an upstream gradient of 1 replaces `logits`."""
    *inputs, backend, columns, objective = arguments
    inputs, columns = RowInputs.from_arguments(*inputs), LossColumns(*columns)
    policy = PolicyObjective.from_text(objective)
    dtype = compute_dtype(logits)
    if backend == "triton":
        from exgrpo_kernels.rowwise import TritonRows

        buffer = TritonRows(logits, operand_dtype=logits.dtype)
    else:
        # PyTorch reads low-precision logits through a float32 copy
        buffer = TorchRows(
            logits.to(dtype),
            has_softcap=inputs.softcap is not None,
            operand_dtype=dtype,
            closes_gaps=False,
        )
    statistics, gradient = buffer.policy_gradient(inputs, policy, columns)
    if gradient.scale_L is not None:
        gradient.dlogits_LV.mul_(gradient.scale_L[:, None])
    if buffer.logits is not logits:
        logits.copy_(gradient.dlogits_LV)
    return statistics.logprobs, statistics.entropy


@policy_loss_from_logits_operator.register_fake
def _(logits, *arguments):
    new = logits.new_empty
    dtype = compute_dtype(logits)
    return new(len(logits), dtype=dtype), new(len(logits), dtype=dtype)


# ---- public --------------------------------------------------------------------------------------


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    weights: Tensor,
    shaping: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    kl_weights: Tensor | None = None,
    objective: PolicyObjective | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    in_place: bool = True,
    backend: str = "auto",
) -> PolicyLoss:
    """(N, V), (N,) -> float32 scalar: the loss of `linear_policy_loss` where logits exist already.

    logits     bfloat16, float16, float32 or float64, rows with any stride. With `in_place`, and
               when they require a gradient, the gradient overwrites them: their values are
               gone after this call, and autograd raises if another node saved them.
    The other arguments, their errors and the result are those of `linear_policy_loss`; a bias gets
    no gradient here. In low precision the gradient is rounded to the dtype of the logits.
    """
    objective = resolve_objective(objective)
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype not in HEAD_DTYPES:
        raise ValueError(f"logits must be floating [N, V], got {logits.dtype} {list(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1 and len(logits) > 0:
        raise ValueError(f"logits must be contiguous in their rows, got strides {logits.stride()}")
    num_rows, num_tokens = logits.shape
    dtype, device = compute_dtype(logits), logits.device
    check_vector("weights", weights, num_rows, device)
    inputs = row_inputs(
        targets,
        HeadOptions(bias, temperature, softcap),
        num_rows=num_rows,
        num_tokens=num_tokens,
        device=device,
        dtype=dtype,
    ).with_checked_values(num_tokens, weights.detach() != 0)
    columns = LossColumns(
        advantages, behaviour_logprobs, weights, shaping, ref_logprobs, sequence_ids, kl_weights
    ).checked(objective, num_rows, dtype, device)
    backend = runtime.resolve_backend(backend, device, dtype)
    (wants_gradient,) = needs_gradients(logits)
    # a detached tensor shares the version counter, by which autograd sees the change
    made = logits.detach() if in_place and wants_gradient else logits.detach().clone()
    with torch.no_grad():
        logprobs, entropy = policy_loss_from_logits_operator(
            made, *inputs.arguments(), backend, columns.arguments(), objective.as_text()
        )
        result = finished_loss(objective, columns, targets, num_tokens, logprobs, entropy)
    if not wants_gradient:
        return result
    return result._replace(
        loss=WithGradients.apply(result.loss, logits, None, None, made, None, None)
    )
