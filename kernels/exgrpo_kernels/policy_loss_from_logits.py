"""The policy loss for those who hold logits already: their gradient takes their memory.

Statistics, coefficients and gradient are those of the row kernels; no GEMM is made here.
Legend: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import HEAD_DTYPES, RowInputs, compute_dtype, row_inputs
from exgrpo_kernels.objective import (
    LossColumns,
    PolicyObjective,
    check_vector,
    loss_columns,
    resolve_objective,
)
from exgrpo_kernels.policy_loss import PolicyLoss, WithGradients, finished_loss
from exgrpo_kernels.rowwise_torch import TorchRows

# ---- operator ------------------------------------------------------------------------------------


@torch.library.custom_op("exgrpo_kernels::policy_loss_from_logits_", mutates_args=("logits",))
def policy_loss_from_logits_operator(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    backend: str,
    weights: Tensor,
    trained: Tensor,
    advantages: Tensor,
    behaviour_logprobs: Tensor,
    shaping: Tensor | None,
    ref_logprobs: Tensor | None,
    sequence_ids: Tensor | None,
    objective: str,
) -> tuple[Tensor, Tensor]:
    """logprobs, entropy; the gradient for an upstream gradient of 1 replaces `logits`."""
    inputs = RowInputs(targets, bias, temperatures, temperature, softcap)
    columns = LossColumns(
        weights, trained, advantages, behaviour_logprobs, shaping, ref_logprobs, sequence_ids
    )
    policy = PolicyObjective.from_text(objective)
    dtype = compute_dtype(logits)
    if backend == "triton":
        from exgrpo_kernels.rowwise import TritonRows

        buffer = TritonRows(logits, operand_dtype=logits.dtype)
    else:
        # PyTorch reads low-precision logits through a float32 copy
        buffer = TorchRows(
            logits.to(dtype),
            has_softcap=softcap is not None,
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
    objective: PolicyObjective | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    in_place: bool = True,
    backend: str = "auto",
) -> PolicyLoss:
    """(N, V), (N,) -> float32 scalar: the loss of `linear_policy_loss` where logits exist already.

    logits     bfloat16, float16, float32 or float64, rows with any stride. With `in_place`, and
               when they require a gradient, the gradient takes their memory: their values are
               gone after this call, and autograd refuses to go on if anyone saved them.
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
        num_rows,
        num_tokens,
        device,
        dtype,
        targets=targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
    ).with_checked_values(num_tokens, weights.detach() != 0)
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
    backend = runtime.resolve_backend(backend, device, dtype)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    # a detached tensor shares the version counter, by which autograd sees the change
    made = logits.detach() if in_place and wants_gradient else logits.detach().clone()
    with torch.no_grad():
        logprobs, entropy = policy_loss_from_logits_operator(
            made, *inputs.arguments(), backend, *columns.arguments(), objective.as_text()
        )
        result = finished_loss(objective, columns, targets, num_tokens, logprobs, entropy)
    if not wants_gradient:
        return result
    return result._replace(
        loss=WithGradients.apply(result.loss, logits, None, None, made, None, None)
    )
