"""Log-probability, entropy and lse of the emitted tokens, without the [N, V] logits.

With z = softcap(hidden weight^T + bias) / temperature and p = softmax(z), row by row:

    logprob = z_y - lse        entropy = lse - E_p[z]        lse = log sum_j exp(z_j)

and for upstream gradients c1 = dL/dlogprob, -c2 = dL/dentropy, c3 = dL/dlse

    dz_j = c1 (1[j=y] - p_j) + c2 p_j (log p_j + H) + c3 p_j.

The logits exist one chunk of rows at a time; the backward pass makes them again. Statistics and
sums are float32 (float64 when an input is float64).

Legend: N tokens, R rows of a chunk, V vocabulary, D hidden.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.linear_head import (
    HEAD_SCHEMA,
    ChunkRows,
    Gradients,
    HeadGradients,
    HeadOptions,
    LinearHead,
    LinearLogprob,
    RowCoefficients,
    linear_head,
    write_logits,
)
from exgrpo_kernels.rowwise_torch import TorchRows
from exgrpo_kernels.sparse_backward import TileSelector

# ---- reference -----------------------------------------------------------------------------------


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    kept_ids: Tensor | None = None,
    backend: str = "auto",
) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) x 3: the specification of `linear_logprob`, logits in full."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits_dtype is not None:
        # what rounding takes away has no gradient
        logits = logits + (logits.to(logits_dtype) - logits).detach()
    if kept_ids is not None:
        left_out = kept_ids[:, :1].ge(0).expand(logits.shape).clone()
        rows, places = kept_ids.ge(0).nonzero(as_tuple=True)
        left_out[rows, kept_ids[rows, places].long()] = False
        logits = logits.masked_fill(left_out, -math.inf)
    return logprob_reference(logits, targets, bias=bias, temperature=temperature, softcap=softcap)


def logprob_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> LinearLogprob:
    """(N, V), (N,) -> (N,) x 3: what happens to rows of logits."""
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(logits, -1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return LinearLogprob(logprobs, entropy, torch.logsumexp(logits, -1))


# ---- passes over the chunks ----------------------------------------------------------------------


def buffer_dtypes(head: LinearHead) -> tuple[torch.dtype, torch.dtype]:
    """Of the logits in the buffer, and of their gradient in the GEMMs."""
    is_triton = head.backend == "triton"
    operands = runtime.gemm_dtype(head.hidden_ND, head.weight_VD, head.dtype, is_triton=is_triton)
    # a gradient may be narrower than its logits, never wider
    low = is_triton and operands == torch.bfloat16
    return (head.logits_dtype if low else head.dtype), operands


def chunk_size(head: LinearHead, num_rows: int) -> int:
    """Rows of one chunk of the logits of `num_rows` rows."""
    row_bytes = len(head.weight_VD) * buffer_dtypes(head)[0].itemsize
    rows = runtime.chunk_rows(num_rows, row_bytes, head.hidden_ND.device)
    return rows if head.chunk_rows is None else min(rows, head.chunk_rows)


def chunk_buffer(
    head: LinearHead, num_rows: int, selector: TileSelector | None = None
) -> ChunkRows:
    """The buffer that all chunks of `num_rows` rows share."""
    size, num_columns = chunk_size(head, num_rows), len(head.weight_VD)
    dtype, operands = buffer_dtypes(head)
    logits = runtime.empty_logits(size, num_columns, dtype, head.hidden_ND.device)
    keeps_masses = selector is not None and selector.wants_masses
    keeps_sums = selector is not None and selector.wants_sums
    if head.backend == "triton":
        from exgrpo_kernels.rowwise import TritonRows

        return TritonRows(
            logits, operand_dtype=operands, keeps_masses=keeps_masses, keeps_sums=keeps_sums
        )
    return TorchRows(
        logits,
        has_softcap=head.inputs.softcap is not None,
        operand_dtype=operands,
        keeps_masses=keeps_masses,
        keeps_sums=keeps_sums,
    )


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def new_outputs(head: LinearHead) -> LinearLogprob:
    """[N] x 3, to be filled chunk by chunk."""
    new = head.hidden_ND.new_empty
    return LinearLogprob(*(new(len(head), dtype=head.dtype) for _ in range(3)))


def store_outputs(outputs: LinearLogprob, rows: slice | Tensor, statistics: LinearLogprob) -> None:
    for output, value in zip(outputs, statistics, strict=True):
        output[rows] = value


def score_rows(head: LinearHead) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) x 3: the scoring pass, one GEMM and one sweep."""
    outputs, buffer = new_outputs(head), chunk_buffer(head, len(head))
    for rows in chunks(len(head), len(buffer.logits)):
        chunk = head.rows(rows)
        write_logits(buffer, chunk)
        store_outputs(outputs, rows, buffer.statistics(chunk.inputs))
    return outputs


def recompute_gradients(
    head: LinearHead,
    outputs: LinearLogprob,
    coefficients: RowCoefficients,
    needs: Sequence[bool],
    main_grad: Tensor | None = None,
    selector: TileSelector | None = None,
) -> Gradients:
    """dX, dW, db from the statistics of a finished forward pass; makes each chunk of logits again.

    The second phase where coefficients need the statistics of all rows. Rows without a gradient
    are left out where the host can read the coefficients.
    """
    gradients = HeadGradients.like(head, needs, main_grad)
    order = None
    if runtime.can_read_values(head.hidden_ND.device):
        alive = coefficients.alive()
        order = None if bool(alive.all()) else alive.nonzero().squeeze(1)
    num_rows = len(head) if order is None else len(order)
    buffer = chunk_buffer(head, num_rows, selector)
    for rows in chunks(num_rows, len(buffer.logits)):
        index = rows if order is None else order[rows]
        chunk, taken = head.rows(index), coefficients.rows(index)
        statistics = LinearLogprob(*(value[index] for value in outputs))
        write_logits(buffer, chunk)
        gradients.add(chunk, buffer.gradient(chunk.inputs, statistics, taken), index, selector)
    return gradients.finish(head)


# ---- operators: torch.compile and CUDA graphs see one node each ----------------------------------


@torch.library.custom_op(
    "exgrpo_kernels::linear_logprob",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def linear_logprob_operator(*arguments):
    """`score_rows` of the fields of a `LinearHead`."""
    return tuple(score_rows(LinearHead.from_arguments(*arguments)))


@linear_logprob_operator.register_fake
def _(*arguments):
    return tuple(new_outputs(LinearHead.from_arguments(*arguments)))


@torch.library.custom_op(
    "exgrpo_kernels::linear_logprob_backward",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor logprobs, Tensor entropy, Tensor lse, "
    "Tensor c1, Tensor? c2, Tensor? c3, bool[] needs) -> Tensor[]",
)
def linear_logprob_backward_operator(*arguments):
    """`recompute_gradients`; only the gradients of `needs` come back, in order."""
    *head, logprobs, entropy, lse, c1, c2, c3, needs = arguments
    outputs, coefficients = LinearLogprob(logprobs, entropy, lse), RowCoefficients(c1, c2, c3)
    gradients = recompute_gradients(LinearHead.from_arguments(*head), outputs, coefficients, needs)
    return [gradient for gradient in gradients if gradient is not None]


@linear_logprob_backward_operator.register_fake
def _(hidden, weight, targets, bias, *arguments):
    needs = arguments[-1]
    return [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, needed in zip((hidden, weight, bias), needs, strict=True)
        if needed
    ]


def _save_for_backward(ctx, inputs, output):
    tensors, ctx.settings = inputs[:6], inputs[6:]  # the settings: from the temperature on
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, logprob_gradient, entropy_gradient, lse_gradient):
    *tensors, logprobs, entropy, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2]) + [ctx.needs_input_grad[3]]
    if logprob_gradient is None:
        logprob_gradient = torch.zeros_like(logprobs)
    gradients = iter(
        linear_logprob_backward_operator(
            *tensors,
            *ctx.settings,
            logprobs,
            entropy,
            lse,
            logprob_gradient,
            None if entropy_gradient is None else -entropy_gradient,
            lse_gradient,
            needs,
        )
    )
    hidden, weight, bias = (next(gradients) if needed else None for needed in needs)
    return hidden, weight, None, bias, *[None] * (2 + len(ctx.settings))


linear_logprob_operator.register_autograd(_backward, setup_context=_save_for_backward)


# ---- public --------------------------------------------------------------------------------------


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    kept_ids: Tensor | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) float32 x 3: logprobs, entropy, lse, differentiable.

    hidden, weight   bfloat16, float16, float32 or float64 (which makes everything float64)
    targets          int64, the emitted token of every row, in [0, V)
    bias             [V]; -inf removes a column (padded vocabulary), exactly
    temperature      a number, or float [N], > 0; the logits are divided by it, last of all
    softcap          logits become softcap * tanh(logits / softcap) before the temperature
    logits_dtype     None leaves the logits of the GEMM in float32; torch.bfloat16 rounds them, as
                     an engine might that is to be matched (up to 0.12 in a log-probability)
    kept_ids         int32 or int64 [N, K], the ids that top-k, top-p or min-p left when the token
                     was drawn, -1 behind the last: the distribution is that over them, its
                     gradient 0 outside. A row of -1 has the whole vocabulary. Not with a softcap
    backend          "auto" (Triton on CUDA, else PyTorch), "triton" or "torch"; "triton" runs on
                     a CPU when TRITON_INTERPRET=1 was set before the import
    chunk_rows       at most so many rows of logits at a time; None: by the device

    Gradients reach hidden, weight and bias through all three outputs, and are not differentiable
    again. Without gradients this is the scoring pass: one GEMM and one sweep over each chunk.
    The formulas are those of the softmax (module docstring). N = 0 is legal.
    Errors: ValueError naming the argument, for shapes, dtypes, devices, temperature <= 0 and a
    target outside [0, V) or its kept set; on CUDA the last two are device-side asserts, which do not synchronise.
    """
    options = HeadOptions(bias, temperature, softcap, logits_dtype, backend, chunk_rows, kept_ids)
    head = linear_head(hidden, weight, targets, options).with_checked_values()
    return LinearLogprob(*linear_logprob_operator(*head.arguments()))
