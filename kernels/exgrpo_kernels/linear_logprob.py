"""Log-probability, entropy and lse of the emitted tokens, without the [N, V] logits.

With z = softcap(hidden weight^T + bias) / temperature and p = softmax(z), row by row:

    logprob = z_y - lse        entropy = lse - E_p[z]        lse = log sum_j exp(z_j)

and for upstream gradients c1 = dL/dlogprob, -c2 = dL/dentropy, c3 = dL/dlse

    dz_j = c1 (1[j=y] - p_j) + c2 p_j (log p_j + H) + c3 p_j.

The logits exist one chunk of rows at a time; the backward pass makes them again. Statistics and
sums are float32 (float64 when an input is float64).

Legend: N tokens, R rows of a chunk, B rows of a block, V vocabulary, D hidden.
"""

# pyright: reportIncompatibleMethodOverride=false

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from exgrpo_kernels import runtime

HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# exp(-1000) is 0 in float64 too, so replacing -inf by it changes no probability, and 0 * -1000
# is 0 where 0 * -inf would be NaN.
LOWEST_SHIFTED_LOGIT = -1000.0


class LinearLogprob(NamedTuple):
    """[N] each, float32: log p(target), entropy of p, log-sum-exp of the scaled logits."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


# ---- reference -----------------------------------------------------------------------------------


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) x 3: the specification of `linear_logprob`, logits in full."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(logits, -1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return LinearLogprob(logprobs, entropy, torch.logsumexp(logits, -1))


# ---- chunked: the head and its checks ------------------------------------------------------------


@dataclass(frozen=True)
class LinearHead:
    """The checked inputs of the head; `temperature` is a number or a [N] tensor."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    bias_V: Tensor | None
    temperature: float | Tensor
    softcap: float | None
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.hidden_ND.shape[0]

    def rows(self, index: slice | Tensor) -> "LinearHead":
        temperature = self.temperature
        return replace(
            self,
            hidden_ND=self.hidden_ND[index],
            targets_N=self.targets_N[index],
            temperature=temperature[index] if isinstance(temperature, Tensor) else temperature,
        )


def linear_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    trained: Tensor | None = None,
) -> LinearHead:
    """Check the inputs; rows that are not `trained` may hold any target and temperature."""
    for name, value, shape in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        if value.ndim != 2:
            raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
        if value.dtype not in HEAD_DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in HEAD_DTYPES)
            raise ValueError(f"{name} must be one of {accepted}, got {value.dtype}")
    (num_rows, num_hidden), (num_tokens, device) = hidden.shape, (weight.shape[0], hidden.device)
    if weight.shape[1] != num_hidden:
        raise ValueError(
            f"weight must have shape [V, {num_hidden}] to match hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if num_tokens == 0:
        raise ValueError(f"weight must hold at least one token, got shape {list(weight.shape)}")
    if targets.shape != (num_rows,):
        raise ValueError(f"targets must have shape [{num_rows}], got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if bias is not None and bias.shape != (num_tokens,):
        raise ValueError(f"bias must have shape [{num_tokens}], got {list(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be a floating tensor, got {bias.dtype}")
    for name, value in (("weight", weight), ("targets", targets), ("bias", bias)):
        if value is not None and value.device != device:
            raise ValueError(f"{name} must be on {device} like hidden, got {value.device}")

    in_range = (targets >= 0) & (targets < num_tokens)
    allowed = in_range if trained is None else in_range | ~trained
    runtime.require(allowed.all(), f"targets must lie in [0, {num_tokens}) on every trained row")
    targets = torch.where(in_range, targets, 0)

    double = torch.float64 in (hidden.dtype, weight.dtype)
    dtype = torch.float64 if double else torch.float32
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        if temperature.shape != (num_rows,):
            raise ValueError(
                f"temperature must be a number or have shape [{num_rows}], "
                f"got {list(temperature.shape)}"
            )
        if temperature.device != device:
            raise ValueError(f"temperature must be on {device}, got {temperature.device}")
        temperature = temperature.detach().to(dtype)
        if trained is not None:
            temperature = torch.where(trained, temperature, 1.0)
        positive = ((temperature > 0) & temperature.isfinite()).all()
        runtime.require(positive, "temperature must be > 0 and finite on every row")
    else:
        temperature = float(temperature)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap}")
    return LinearHead(hidden, weight, targets, bias, temperature, softcap, dtype)


class Workspace:
    """The buffers that every chunk uses again: [R, V] logits and one or two [B, V] blocks."""

    def __init__(self, head: LinearHead):
        num_columns, device = head.weight_VD.shape[0], head.weight_VD.device
        row_bytes = num_columns * head.dtype.itemsize
        self.num_rows = runtime.chunk_rows(len(head), row_bytes)
        self.logits = runtime.empty_logits(self.num_rows, num_columns, head.dtype, device)
        block = runtime.block_rows(self.num_rows, row_bytes)
        self.block = torch.empty(block, num_columns, dtype=head.dtype, device=device)
        self.slope = None if head.softcap is None else torch.empty_like(self.block)

    def chunks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.num_rows):
            yield slice(start, min(start + self.num_rows, num_rows))

    def blocks(self, num_rows: int) -> Iterator[slice]:
        step = len(self.block)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))


# ---- chunked: forward ----------------------------------------------------------------------------


def write_logits(head: LinearHead, out_RV: Tensor) -> None:
    """z = softcap(hidden weight^T + bias) / temperature for the rows of `head`, into `out`."""
    hidden, tau = head.hidden_ND, head.temperature
    tau = tau[:, None] if isinstance(tau, Tensor) else tau
    scaled = isinstance(tau, Tensor) or tau != 1.0
    # Dividing [R, D] instead of [R, V]; not where the GEMM would round it to a low precision.
    early = scaled and head.softcap is None and not hidden.is_cuda
    if early:
        hidden = hidden.to(head.dtype) / tau
    runtime.logits_into(out_RV, hidden, head.weight_VD)
    if head.bias_V is not None:
        bias = head.bias_V.detach().to(head.dtype)[None]
        if early and isinstance(tau, Tensor):
            out_RV.addcdiv_(bias, tau)
        else:
            out_RV.add_(bias / tau if early else bias)
    if head.softcap is not None:
        out_RV.div_(head.softcap).tanh_().mul_(head.softcap)
    if scaled and not early:
        out_RV.div_(tau)


class RowStatistics(NamedTuple):
    """[R] each; the logits were left shifted by `shift`, and sum_j exp(z_j - shift) = `total`."""

    logprobs: Tensor
    entropy: Tensor
    shift: Tensor
    total: Tensor

    @property
    def lse(self) -> Tensor:
        return self.shift + self.total.log()


def row_statistics_(head: LinearHead, workspace: Workspace, z_RV: Tensor) -> RowStatistics:
    """Statistics of each row of logits; leaves z - shift in their place.

    What needs no scratch runs over the whole chunk: fewer parallel regions, each ending in a wait
    for the slowest core.
    """
    shift = torch.amax(z_RV, -1)
    z_RV.sub_(shift[:, None])
    target = z_RV.gather(1, head.targets_N[:, None]).squeeze(1)
    if head.bias_V is not None:
        z_RV.clamp_(min=LOWEST_SHIFTED_LOGIT)
    total, moment = torch.empty_like(shift), torch.empty_like(shift)
    for rows in workspace.blocks(len(z_RV)):
        z = z_RV[rows]
        exps = torch.exp(z, out=workspace.block[: len(z)])
        torch.sum(exps, -1, out=total[rows])
        torch.sum(exps.mul_(z), -1, out=moment[rows])
    log_total = total.log()
    return RowStatistics(target - log_total, log_total - moment / total, shift, total)


def linear_statistics(head: LinearHead) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) x 3: the scoring pass, one GEMM and one sweep."""
    outputs = [head.hidden_ND.new_empty(len(head), dtype=head.dtype) for _ in range(3)]
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
    return LinearLogprob(*outputs)


# ---- chunked: gradients --------------------------------------------------------------------------


@dataclass
class HeadGradients:
    """Sums of dX, dW, db in the compute dtype; None where the input needs no gradient."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    is_weight_written: bool = False

    @staticmethod
    def like(head: LinearHead, needs: tuple[bool, bool, bool]) -> "HeadGradients":
        """`needs` says whether hidden, weight and bias want a gradient."""
        needs_hidden, needs_weight, needs_bias = needs
        hidden, weight, bias, dtype = head.hidden_ND, head.weight_VD, head.bias_V, head.dtype
        return HeadGradients(
            hidden.new_zeros(hidden.shape) if needs_hidden else None,
            # the first chunk overwrites, which saves a pass of zeros over [V, D]
            weight.new_empty(weight.shape, dtype=dtype) if needs_weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if needs_bias and bias is not None else None,
        )

    def finish(self, head: LinearHead) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dX, dW, db in the dtypes of the inputs."""
        weight, bias = self.weight_VD, self.bias_V
        if weight is not None:
            if not self.is_weight_written:
                weight.zero_()
            weight = weight.to(head.weight_VD.dtype)
        if bias is not None and head.bias_V is not None:
            bias = bias.to(head.bias_V.dtype)
        return self.hidden_ND, weight, bias


class RowCoefficients(NamedTuple):
    """[R] each: c1 = dL/dlogprob, c2 = -dL/dentropy, c3 = dL/dlse; None is zero everywhere."""

    c1: Tensor
    c2: Tensor | None = None
    c3: Tensor | None = None

    def alive(self) -> Tensor:
        """(R,) bool: rows that send anything back. NaN is alive."""
        alive = self.c1 != 0
        for other in (self.c2, self.c3):
            alive = alive if other is None else alive | (other != 0)
        return alive

    def rows(self, index: slice | Tensor) -> "RowCoefficients":
        c2, c3 = self.c2, self.c3
        return RowCoefficients(
            self.c1[index], None if c2 is None else c2[index], None if c3 is None else c3[index]
        )


def close_gaps_(z_RV: Tensor, alive_R: Tensor, workspace: Workspace) -> Tensor:
    """Move live rows from the end into the places of dead ones; (L,) says which row is where.

    Only as many rows move as there are gaps, so a chunk with few dead rows costs little.
    """
    num_alive = int(alive_R.sum())
    order = torch.arange(num_alive, device=z_RV.device)
    gaps = (~alive_R[:num_alive]).nonzero().squeeze(1)
    movers = alive_R[num_alive:].nonzero().squeeze(1) + num_alive
    for rows in workspace.blocks(len(gaps)):
        moved = workspace.block[: rows.stop - rows.start]
        torch.index_select(z_RV, 0, movers[rows], out=moved)
        z_RV.index_copy_(0, gaps[rows], moved)
    order[gaps] = movers
    return order


def logits_to_gradient_(
    head: LinearHead,
    workspace: Workspace,
    z_RV: Tensor,
    statistics: RowStatistics,
    coefficients: RowCoefficients,
) -> Tensor:
    """Turn z - shift into dz up to a factor per row, and return that factor, (R,).

    The factor joins the [R, D] side of the GEMMs, so that no pass over [R, V] scales rows. The
    target's entry uses expm1(logprob): p_y - 1 would cancel where the policy is nearly certain.
    """
    c1, c2, c3 = coefficients
    logprobs, entropy, shift, total = statistics
    rows_R, targets = torch.arange(len(z_RV), device=z_RV.device), head.targets_N
    if c2 is None and c3 is None and head.softcap is None:
        z_RV.exp_()
        z_RV[rows_R, targets] = torch.expm1(logprobs) * total
        return -c1 / (total * head.temperature)

    # dz = (e / total) (c2 (z - shift) + b), b = -c1 + c3 + c2 (H - log total), plus c1 at y
    offset = -c1 if c3 is None else c3 - c1
    at_target = -c1 * torch.expm1(logprobs)
    if c3 is not None:
        at_target = at_target + c3 * logprobs.exp()
    if c2 is not None:
        offset = offset + c2 * (entropy - total.log())
        # p log p -> 0 for a target on a -inf column
        log_p = logprobs.clamp(min=LOWEST_SHIFTED_LOGIT)
        at_target = at_target + c2 * logprobs.exp() * (log_p + entropy)
    at_target = at_target * total
    for rows in workspace.blocks(len(z_RV)):
        z, exps = z_RV[rows], workspace.block[: rows.stop - rows.start]
        torch.exp(z, out=exps)
        slope = None
        if head.softcap is not None:
            assert workspace.slope is not None
            slope = torch.add(z, shift[rows, None], out=workspace.slope[: len(z)])
            tau = head.temperature
            tau = tau[rows, None] if isinstance(tau, Tensor) else tau
            slope.mul_(tau / head.softcap).square_().neg_().add_(1.0)
        if c2 is None:
            torch.mul(exps, offset[rows, None], out=z)
        else:
            torch.addcmul(offset[rows, None], z, c2[rows, None], out=z)
            z.mul_(exps)
        z[rows_R[: len(z)], targets[rows]] = at_target[rows]
        if slope is not None:
            z.mul_(slope)
    return 1.0 / (total * head.temperature)


def add_gradients_(
    gradients: HeadGradients,
    head: LinearHead,
    workspace: Workspace,
    z_RV: Tensor,
    statistics: RowStatistics,
    coefficients: RowCoefficients,
    rows: slice | Tensor,
) -> None:
    """Add the chunk `rows`, where `row_statistics_` left z - shift, to dX, dW and db.

    `rows` are its places in dX; `head`, `statistics` and `coefficients` hold just these rows.
    Rows without coefficients never enter a GEMM where the host can see them; elsewhere they enter
    as exact zeros.
    """
    alive, order = coefficients.alive(), None
    can_read = runtime.can_read_values(z_RV.device)
    if can_read and not bool(alive.all()):
        order = close_gaps_(z_RV, alive, workspace)
        if len(order) == 0:
            return
        z_RV, head = z_RV[: len(order)], head.rows(order)
        statistics = RowStatistics(*(value[order] for value in statistics))
        coefficients = coefficients.rows(order)
        rows = rows[order] if isinstance(rows, Tensor) else order + rows.start
    scale = logits_to_gradient_(head, workspace, z_RV, statistics, coefficients)
    hidden = head.hidden_ND.to(head.dtype)
    if not can_read:
        # dead rows may hold NaN: select, as 0 * NaN is NaN
        z_RV.masked_fill_(~alive[:, None], 0.0)
        scale = torch.where(alive, scale, 0.0)
        hidden = torch.where(alive[:, None], hidden, 0.0)

    operand_dtype = runtime.gemm_dtype(head.hidden_ND, head.weight_VD, head.dtype)
    dlogits = z_RV.to(operand_dtype)
    if gradients.hidden_ND is not None:
        in_place = isinstance(rows, slice) and gradients.hidden_ND.dtype == head.dtype
        dhidden = gradients.hidden_ND[rows] if in_place else torch.empty_like(hidden)
        runtime.hidden_gradient_into(dhidden, dlogits, head.weight_VD)
        dhidden.mul_(scale[:, None])
        if not in_place:
            gradients.hidden_ND[rows] = dhidden.to(gradients.hidden_ND.dtype)
    if gradients.weight_VD is not None:
        scaled = (hidden * scale[:, None]).to(operand_dtype)
        first = not gradients.is_weight_written
        runtime.weight_gradient_add(gradients.weight_VD, dlogits, scaled, overwrite=first)
        gradients.is_weight_written = True
    if gradients.bias_V is not None:
        gradients.bias_V.addmv_(z_RV.t(), scale)


def recompute_gradients(
    head: LinearHead,
    outputs: LinearLogprob,
    coefficients: RowCoefficients,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX, dW, db from the statistics of a finished forward pass; makes each chunk of logits again.

    The second phase of everything whose coefficients need all rows first.
    """
    gradients = HeadGradients.like(head, needs)
    # Rows that send nothing back are not even made again, where the host can see them.
    order = None
    if runtime.can_read_values(head.hidden_ND.device):
        alive = coefficients.alive()
        order = None if bool(alive.all()) else alive.nonzero().squeeze(1)
    num_rows = len(head) if order is None else len(order)
    workspace = Workspace(head)
    for rows in workspace.chunks(num_rows):
        index = rows if order is None else order[rows]
        chunk, taken = head.rows(index), coefficients.rows(index)
        logprobs, entropy, lse = (value[index] for value in outputs)
        z = workspace.logits[: len(chunk)]
        write_logits(chunk, z)
        z.sub_(lse[:, None])
        if head.bias_V is not None:
            z.clamp_(min=LOWEST_SHIFTED_LOGIT)
        statistics = RowStatistics(logprobs, entropy, lse, torch.ones_like(lse))
        add_gradients_(gradients, chunk, workspace, z, statistics, taken, index)
    return gradients.finish(head)


# ---- autograd ------------------------------------------------------------------------------------


class _LinearLogprob(torch.autograd.Function):
    """Saves the inputs and three vectors; the logits are made again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: LinearHead):
        outputs = linear_statistics(head)
        temperature = head.temperature if isinstance(head.temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, head.targets_N, temperature, *outputs)
        ctx.settings = (head.temperature if temperature is None else None, head.softcap, head.dtype)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, logprob_gradient, entropy_gradient, lse_gradient):
        hidden, weight, bias, targets, temperature, *outputs = ctx.saved_tensors
        number, softcap, dtype = ctx.settings
        temperature = number if temperature is None else temperature
        head = LinearHead(hidden, weight, targets, bias, temperature, softcap, dtype)
        if logprob_gradient is None:
            logprob_gradient = torch.zeros_like(outputs[0])
        c2 = None if entropy_gradient is None else -entropy_gradient
        coefficients = RowCoefficients(logprob_gradient, c2, lse_gradient)
        needs = ctx.needs_input_grad[:3]
        gradients = recompute_gradients(head, LinearLogprob(*outputs), coefficients, needs)
        return *gradients, None


# ---- public --------------------------------------------------------------------------------------


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> LinearLogprob:
    """(N, D), (V, D), (N,) -> (N,) float32 x 3: logprobs, entropy, lse, differentiable.

    hidden, weight   bfloat16, float16, float32 or float64 (which makes everything float64)
    targets          int64, the emitted token of every row, in [0, V)
    bias             [V]; -inf removes a column (padded vocabulary), exactly
    temperature      a number, or float [N], > 0; the logits are divided by it, last of all
    softcap          logits become softcap * tanh(logits / softcap) before the temperature
    backend          "auto" or "torch"

    Gradients reach hidden, weight and bias through all three outputs, and are not differentiable
    again. Without gradients this is the scoring pass: one GEMM and one sweep over each chunk.
    The formulas are those of the softmax (module docstring). N = 0 is legal.
    Errors: ValueError naming the argument, for shapes, dtypes, devices, temperature <= 0 and a
    target outside [0, V); on CUDA the last two are device-side asserts, which do not synchronise.
    """
    head = linear_head(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
    runtime.resolve_backend(backend, hidden.device)
    return LinearLogprob(*_LinearLogprob.apply(hidden, weight, bias, head))
