"""The linear head: its checked inputs, the coefficients of its rows, and the sums dX, dW, db.

A backend implements the protocol `ChunkRows` for the rows of one chunk of logits: `rowwise_torch`
in plain PyTorch, `rowwise` in Triton. The checks, the GEMMs and the sums over chunks are here.

Legend: N tokens, R rows of a chunk, L rows of a chunk that take part in its GEMMs, V vocabulary,
D hidden, K the most tokens that sampling has kept of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exgrpo_kernels import runtime, sparse_backward
from exgrpo_kernels.objective import LossColumns, PolicyObjective
from exgrpo_kernels.sparse_backward import TileMasses, Tiles, TileSelector

HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Operator schemas of the fields of `RowInputs` and `LinearHead`; see their `arguments`.
ROW_SCHEMA = (
    "Tensor targets, Tensor? bias, Tensor? temperatures, Tensor? kept_ids, "
    "float temperature, float? softcap"
)
HEAD_SCHEMA = (
    f"Tensor hidden, Tensor weight, {ROW_SCHEMA}, "
    "ScalarType logits_dtype, str backend, SymInt? chunk_rows"
)


class NonFiniteHidden(ValueError):
    """A hidden state of a trained row holds NaN or inf; a trainer may want to skip the step."""


class LinearLogprob(NamedTuple):
    """[N] each, float32: log p(target), entropy of p, log-sum-exp of the scaled logits."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


# ---- inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadOptions:
    """The options that every function of a linear head takes, unchecked; see `linear_logprob`."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logits_dtype: torch.dtype | None = None
    backend: str = "auto"
    chunk_rows: int | None = None
    kept_ids: Tensor | None = None


@dataclass(frozen=True)
class RowInputs:
    """The inputs of rows of logits x: z = softcap(x + bias) / temperature, and the targets.

    `temperature` is a number, or [N] in the compute dtype. `kept_NK` are the ids that z is defined
    on, -1 behind the last; a row without any has the whole vocabulary.
    """

    targets_N: Tensor
    bias_V: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    kept_NK: Tensor | None = None

    def __len__(self) -> int:
        return self.targets_N.shape[0]

    @property
    def may_hold_infinity(self) -> bool:
        """Whether logits may be -inf: columns that a bias or the kept set leaves out."""
        return self.bias_V is not None or self.kept_NK is not None

    @property
    def temperatures_N(self) -> Tensor | None:
        """The temperatures where every row has its own."""
        return self.temperature if isinstance(self.temperature, Tensor) else None

    @property
    def common_temperature(self) -> float:
        """The temperature of all rows, 1 where every row has its own."""
        return 1.0 if isinstance(self.temperature, Tensor) else self.temperature

    def rows(self, index: slice | Tensor) -> "RowInputs":
        tau = self.temperature
        tau = tau[index] if isinstance(tau, Tensor) else tau
        kept = None if self.kept_NK is None else self.kept_NK[index]
        return replace(self, targets_N=self.targets_N[index], temperature=tau, kept_NK=kept)

    def arguments(self) -> tuple:
        """The fields as an operator with ROW_SCHEMA takes them; see `from_arguments`."""
        tau = self.temperatures_N, self.common_temperature
        return self.targets_N, self.bias_V, tau[0], self.kept_NK, tau[1], self.softcap

    @staticmethod
    def from_arguments(
        targets: Tensor,
        bias: Tensor | None,
        temperatures: Tensor | None,
        kept_ids: Tensor | None,
        temperature: float,
        softcap: float | None,
    ) -> "RowInputs":
        tau = temperature if temperatures is None else temperatures
        return RowInputs(targets, bias, tau, softcap, kept_ids)

    def with_checked_values(self, num_tokens: int, trained_N: Tensor | None) -> "RowInputs":
        """Check values, which shapes do not tell; rows that are not trained may hold anything."""
        in_range = (self.targets_N >= 0) & (self.targets_N < num_tokens)
        allowed = in_range if trained_N is None else in_range | ~trained_N
        runtime.require(
            allowed.all(), f"targets must lie in [0, {num_tokens}) on every trained row"
        )
        tau = self.temperature
        if isinstance(tau, Tensor):
            tau = tau if trained_N is None else torch.where(trained_N, tau, 1.0)
            positive = (tau > 0) & tau.isfinite()
            runtime.require(positive.all(), "temperature must be > 0 and finite on every row")
        targets = torch.where(in_range, self.targets_N, 0)
        kept = self._checked_kept(num_tokens, trained_N)
        return replace(self, targets_N=targets, temperature=tau, kept_NK=kept)

    def _checked_kept(self, num_tokens: int, trained_N: Tensor | None) -> Tensor | None:
        """`kept_NK`, empty in rows that are not trained."""
        kept = self.kept_NK
        if kept is None:
            return None
        if trained_N is not None:
            kept = torch.where(trained_N[:, None], kept, -1)
        in_range = (kept >= -1) & (kept < num_tokens)
        runtime.require(in_range.all(), f"kept_ids must lie in [-1, {num_tokens})")
        # the first of a row is -1 only where all are
        has_set = kept[:, 0] >= 0
        holds_target = (kept == self.targets_N[:, None]).any(-1)
        known = (holds_target | ~has_set) & (has_set | (kept < 0).all(-1))
        runtime.require(
            known.all(), "kept_ids must hold the target of every row, and -1 behind the last id"
        )
        return kept


def row_inputs(
    targets: Tensor,
    options: HeadOptions,
    *,
    num_rows: int,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> RowInputs:
    """Check shapes, dtypes and devices; ValueError names the argument. `dtype` is to compute in."""
    bias, temperature, softcap = options.bias, options.temperature, options.softcap
    if targets.shape != (num_rows,):
        raise ValueError(f"targets must have shape [{num_rows}], got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if bias is not None and bias.shape != (num_tokens,):
        raise ValueError(f"bias must have shape [{num_tokens}], got {list(bias.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be a floating tensor, got {bias.dtype}")
    for name, value in (("targets", targets), ("bias", bias), ("temperature", temperature)):
        if isinstance(value, Tensor) and value.ndim > 0 and value.device != device:
            raise ValueError(f"{name} must be on {device}, got {value.device}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be > 0 and finite, or None, got {softcap}")
    softcap = None if softcap is None else float(softcap)
    kept = options.kept_ids
    if kept is not None:
        check_kept(kept, num_rows, device)
        if softcap is not None:
            raise ValueError("kept_ids do not go with a softcap, in which a logit cannot be -inf")
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        if temperature.shape != (num_rows,):
            raise ValueError(
                f"temperature must be a number or have shape [{num_rows}], "
                f"got {list(temperature.shape)}"
            )
        return RowInputs(targets, bias, temperature.detach().to(dtype), softcap, kept)
    temperature = float(temperature)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    return RowInputs(targets, bias, temperature, softcap, kept)


def check_kept(kept: Tensor, num_rows: int, device: torch.device) -> None:
    """ValueError unless `kept` can be the ids of a set for every row."""
    if kept.ndim != 2 or kept.shape[0] != num_rows or kept.shape[1] == 0:
        raise ValueError(f"kept_ids must have shape [{num_rows}, K], got {list(kept.shape)}")
    if kept.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"kept_ids must be int32 or int64, got {kept.dtype}")
    if kept.device != device:
        raise ValueError(f"kept_ids must be on {device}, got {kept.device}")


@dataclass(frozen=True)
class LinearHead:
    """The logits hidden @ weight^T, rounded to `logits_dtype`, and the inputs of their rows."""

    hidden_ND: Tensor
    weight_VD: Tensor
    inputs: RowInputs
    logits_dtype: torch.dtype
    backend: str
    chunk_rows: int | None = None  # at most so many rows of logits at a time

    def __len__(self) -> int:
        return self.hidden_ND.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics and sums."""
        return compute_dtype(self.hidden_ND, self.weight_VD)

    def rows(self, index: slice | Tensor) -> "LinearHead":
        return replace(self, hidden_ND=self.hidden_ND[index], inputs=self.inputs.rows(index))

    def arguments(self) -> tuple:
        """The fields as an operator with HEAD_SCHEMA takes them; see `from_arguments`."""
        tensors, settings = self.inputs.arguments(), (self.logits_dtype, self.backend)
        return self.hidden_ND, self.weight_VD, *tensors, *settings, self.chunk_rows

    @staticmethod
    def from_arguments(hidden: Tensor, weight: Tensor, *arguments) -> "LinearHead":
        *inputs, logits_dtype, backend, chunk_rows = arguments
        inputs = RowInputs.from_arguments(*inputs)
        return LinearHead(hidden, weight, inputs, logits_dtype, backend, chunk_rows)

    def with_checked_values(self, trained_N: Tensor | None = None) -> "LinearHead":
        """Check values, which shapes do not tell; rows that are not trained may hold anything.

        ValueError on a CPU. On CUDA a device-side assert for what would read out of bounds, while
        a non-finite hidden state makes a NaN loss there, which costs nothing and kills no run;
        EXGRPO_KERNELS_DEBUG=1 raises for everything there too, with synchronisations.
        """
        inputs = self.inputs.with_checked_values(len(self.weight_VD), trained_N)
        if trained_N is not None and runtime.is_free_to_read(self.hidden_ND):
            bad = (~self.hidden_ND.isfinite().all(-1) & trained_N).nonzero()
            if len(bad) > 0:
                shape = list(self.hidden_ND.shape)
                raise NonFiniteHidden(
                    f"hidden {shape} must be finite on every trained row, row {int(bad[0])} is not"
                )
        return replace(self, inputs=inputs)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is, else float32."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def linear_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions
) -> LinearHead:
    """Check shapes, dtypes and devices; ValueError names the argument."""
    for name, value, shape in (("hidden", hidden, "[N, D]"), ("weight", weight, "[V, D]")):
        if value.ndim != 2:
            raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
        if value.dtype not in HEAD_DTYPES:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in HEAD_DTYPES)
            raise ValueError(f"{name} must be one of {accepted}, got {value.dtype}")
    num_rows, num_hidden = hidden.shape
    if weight.shape[1] != num_hidden:
        raise ValueError(
            f"weight must have shape [V, {num_hidden}] to match hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if len(weight) == 0:
        raise ValueError(f"weight must hold at least one token, got shape {list(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} like hidden, got {weight.device}")
    logits_dtype, chunk_rows = options.logits_dtype, options.chunk_rows
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    device, dtype = hidden.device, compute_dtype(hidden, weight)
    if logits_dtype not in (None, dtype, torch.bfloat16):
        raise ValueError(f"logits_dtype must be {dtype}, torch.bfloat16 or None: {logits_dtype}")
    num_tokens = len(weight)
    inputs = row_inputs(
        targets, options, num_rows=num_rows, num_tokens=num_tokens, device=device, dtype=dtype
    )
    backend = runtime.resolve_backend(options.backend, device, dtype)
    return LinearHead(hidden, weight, inputs, logits_dtype or dtype, backend, chunk_rows)


# ---- what a backend does -------------------------------------------------------------------------


class RowCoefficients(NamedTuple):
    """[R] each: c1 = dL/dlogprob, c2 = -dL/dentropy, c3 = dL/dlse; None is zero everywhere."""

    c1: Tensor
    c2: Tensor | None = None
    c3: Tensor | None = None

    def alive(self) -> Tensor:
        """(R,) bool: rows with a non-zero gradient. NaN is alive."""
        alive = self.c1 != 0
        for other in (self.c2, self.c3):
            alive = alive if other is None else alive | (other != 0)
        return alive

    def rows(self, index: slice | Tensor) -> "RowCoefficients":
        c2, c3 = self.c2, self.c3
        return RowCoefficients(
            self.c1[index], None if c2 is None else c2[index], None if c3 is None else c3[index]
        )


class LogitGradient(NamedTuple):
    """dL/dlogits of a chunk is scale[:, None] * dlogits; a scale of None is one.

    `kept` are the rows of the chunk that these are; None: all of them, in order, perhaps followed
    by padding. Rows that are not `alive` are exactly zero; None: all are alive. `masses` are None
    unless the buffer was made to keep them.
    """

    dlogits_LV: Tensor
    scale_L: Tensor | None = None
    kept_L: Tensor | None = None
    alive_L: Tensor | None = None
    masses: TileMasses | None = None

    def num_alive(self, num_rows: int) -> int | Tensor:
        """How many of the chunk's `num_rows` rows have a non-zero gradient."""
        if self.alive_L is not None:
            return self.alive_L.sum()
        return num_rows if self.kept_L is None else len(self.kept_L)


class ChunkRows(Protocol):
    """A chunk of raw logits and the operations on its rows; `inputs` are those of its rows."""

    logits: Tensor

    def padded(self, num_rows: int) -> int:
        """How many rows the GEMMs of `num_rows` rows have."""
        ...

    def statistics(self, inputs: RowInputs) -> LinearLogprob:
        """Log-probabilities, entropies and lse of raw logits."""
        ...

    def gradient(
        self, inputs: RowInputs, statistics: LinearLogprob, coefficients: RowCoefficients
    ) -> LogitGradient:
        """The gradient in place of raw logits whose `statistics` are of an earlier pass."""
        ...

    def policy_gradient(
        self, inputs: RowInputs, objective: PolicyObjective, columns: LossColumns
    ) -> tuple[LinearLogprob, LogitGradient]:
        """Statistics and gradient of raw logits; the coefficients follow from the statistics."""
        ...


def write_logits(rows: ChunkRows, chunk: LinearHead) -> None:
    """The GEMM of a chunk, into `rows.logits`; padding rows are zero."""
    num_rows = rows.padded(len(chunk))
    out_RV = rows.logits[:num_rows]
    runtime.logits_into(out_RV, padded(chunk.hidden_ND, num_rows), chunk.weight_VD)
    if out_RV.dtype != chunk.logits_dtype:
        out_RV.copy_(out_RV.to(chunk.logits_dtype))
    if chunk.inputs.kept_NK is not None:
        keep_only_(out_RV[: len(chunk)], chunk.inputs.kept_NK)


def keep_only_(logits_RV: Tensor, kept_RK: Tensor) -> None:
    """-inf in all columns but the kept ones; a row without ids is left as it is."""
    has_set = kept_RK[:, :1] >= 0
    # in place of -1 the first id again: written twice, with the same value
    index = torch.where(kept_RK >= 0, kept_RK, kept_RK[:, :1]).clamp(min=0).long()
    values = logits_RV.gather(1, index)
    logits_RV.masked_fill_(has_set, -math.inf)
    logits_RV.scatter_(1, index, values)


def padded(rows_RD: Tensor, num_rows: int) -> Tensor:
    """(R, D) -> (num_rows, D), zero rows at the end."""
    if len(rows_RD) == num_rows:
        return rows_RD
    out = rows_RD.new_zeros(num_rows, rows_RD.shape[1])
    out[: len(rows_RD)] = rows_RD
    return out


def sparse_products(head: LinearHead) -> Any:
    """The block-sparse products of the backend, for all chunks of one call."""
    if head.backend == "triton":
        from exgrpo_kernels import sparse_kernels

        return sparse_kernels
    return sparse_backward


# ---- sums over the chunks ------------------------------------------------------------------------

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass
class HeadGradients:
    """Sums of dX, dW, db; dW and db in the compute dtype. None: the input needs no gradient."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    products: Any  # block-sparse ones
    centroids: sparse_backward.Centroids = field(default_factory=sparse_backward.Centroids)
    is_weight_written: bool = False
    joins_main_grad: bool = False

    @staticmethod
    def like(
        head: LinearHead, needs: Sequence[bool], main_grad: Tensor | None = None
    ) -> "HeadGradients":
        """`needs` says whether hidden, weight and bias want a gradient; dW may join `main_grad`."""
        needs_hidden, needs_weight, needs_bias = needs
        hidden, weight, bias, dtype = head.hidden_ND, head.weight_VD, head.inputs.bias_V, head.dtype
        total = main_grad
        if needs_weight and main_grad is None:
            # the first chunk overwrites, which saves a pass of zeros over [V, D]
            total = weight.new_empty(weight.shape, dtype=dtype)
        return HeadGradients(
            hidden.new_zeros(hidden.shape) if needs_hidden else None,
            total if needs_weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if needs_bias and bias is not None else None,
            sparse_products(head),
            is_weight_written=main_grad is not None,
            joins_main_grad=main_grad is not None,
        )

    def add(
        self,
        chunk: LinearHead,
        gradient: LogitGradient,
        rows: slice | Tensor,
        selector: TileSelector | None = None,
    ) -> None:
        """Add a chunk whose rows are `rows` of the batch, or the tiles of it that `selector` keeps."""
        dlogits, scale, kept, alive, masses = gradient
        tiles = None
        if selector is not None:
            selector.count_rows(gradient.num_alive(len(chunk)))
            tiles = selector.select(masses)
        if len(dlogits) == 0:
            return
        hidden = chunk.hidden_ND
        if kept is not None:
            hidden = hidden[kept]
            rows = rows[kept] if isinstance(rows, Tensor) else kept + rows.start
        if self.hidden_ND is not None:
            self._add_hidden(self.hidden_ND, chunk, gradient, rows, tiles)
        if self.weight_VD is not None:
            if alive is not None:
                # a dead row may hold NaN: select, as 0 * NaN is NaN
                hidden = torch.where(alive[:, None], hidden, 0.0)
            if selector is not None and selector.tail == "dense_dw":
                tiles = None
            self._add_weight(self.weight_VD, chunk, gradient, hidden, tiles)
        if self.bias_V is not None:
            if scale is None:
                self.bias_V.add_(dlogits.sum(0, dtype=self.bias_V.dtype))
            else:
                self.bias_V.addmv_(dlogits.to(scale.dtype).t(), scale)

    def _add_hidden(
        self,
        out_ND: Tensor,
        chunk: LinearHead,
        gradient: LogitGradient,
        rows: slice | Tensor,
        tiles: Tiles | None,
    ) -> None:
        """Write the rows `rows` of dX, in place where no further operation follows the product."""
        dlogits, scale = gradient.dlogits_LV, gradient.scale_L
        residue = None if tiles is None else tiles.residue_RT
        # a scale is applied, and a residue added, before anything is rounded
        direct = scale is None and residue is None and dlogits.dtype == out_ND.dtype
        dtype = out_ND.dtype if direct else chunk.dtype
        num_rows = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        in_place = isinstance(rows, slice) and num_rows == len(dlogits) and out_ND.dtype == dtype
        shape = len(dlogits), out_ND.shape[1]
        out = out_ND[rows] if in_place else out_ND.new_empty(shape, dtype=dtype)
        if tiles is None:
            runtime.hidden_gradient_into(out, dlogits, chunk.weight_VD)
        else:
            self.products.hidden_gradient_into(out, dlogits, chunk.weight_VD, tiles.kept_GT)
        if scale is not None:
            out.mul_(scale[:, None])
        if residue is not None:
            out += self.centroids.of_hidden(residue, chunk.weight_VD)
        if not in_place:
            out_ND[rows] = out[:num_rows].to(out_ND.dtype)

    def _add_weight(
        self,
        out_VD: Tensor,
        chunk: LinearHead,
        gradient: LogitGradient,
        hidden_LD: Tensor,
        tiles: Tiles | None,
    ) -> None:
        """Add to dW; the first chunk overwrites it."""
        dlogits, scale = gradient.dlogits_LV, gradient.scale_L
        scaled = hidden_LD if scale is None else hidden_LD.to(scale.dtype) * scale[:, None]
        operand, first = padded(scaled.to(dlogits.dtype), len(dlogits)), not self.is_weight_written
        if tiles is None:
            runtime.weight_gradient_add(out_VD, dlogits, operand, overwrite=first)
        else:
            self.products.weight_gradient_add(
                out_VD, dlogits, operand, tiles.kept_GT, overwrite=first
            )
            if tiles.residue_RT is not None:
                unscaled = padded(hidden_LD, len(dlogits))
                self.centroids.add_for_weight(tiles.residue_RT, unscaled)
        self.is_weight_written = True

    def finish(self, head: LinearHead) -> Gradients:
        """dX, dW, db in the dtypes of the inputs; dW is None where it joined a main_grad."""
        weight, bias = self.weight_VD, self.bias_V
        if weight is not None and self.is_weight_written:
            self.centroids.spread_into(weight)
        if self.joins_main_grad:
            weight = None
        if weight is not None:
            if not self.is_weight_written:
                weight.zero_()
            weight = weight.to(head.weight_VD.dtype)
        if bias is not None and head.inputs.bias_V is not None:
            bias = bias.to(head.inputs.bias_V.dtype)
        return self.hidden_ND, weight, bias
