"""Block-sparse dX and dW: only tiles of the logit gradient that are large enough are multiplied.

A policy is nearly certain of most tokens, so most of its logit gradient is close to zero. The row
sweep stores the mass sum |dz| of every tile of COLUMNS columns. A tile of ROWS rows is kept when
the mass of any of its rows reaches

    mass >= threshold * mean |c1|,      the mean over the rows of the chunk with a gradient.

The rule is on mass, not on single elements: in a flat row no element is large, but their sum is.
It is relative to the mean of the batch, not to the row: rows of weight or advantage 0 are dropped,
rows of high weight are kept. The share that is dropped is returned as a metric.

`masked_reference` is the specification: the dense products of the masked gradient.
Legend: R rows of a chunk, V vocabulary, D hidden, G groups of ROWS rows, T tiles of COLUMNS columns.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels import runtime

# A tile: as many rows as an output block of dX has, as many columns as one step of its inner loop.
ROWS, COLUMNS = 128, 64

TAILS = ("drop", "centroid", "dense_dw")
DEFAULT_THRESHOLD = 1e-4


class Sparsity(NamedTuple):
    """Which tiles are dropped; a threshold of None is dense.

    With `is_auto` a chunk that keeps more than `runtime.BREAK_EVEN_DENSITY` of its tiles is
    multiplied densely, and nothing of it is dropped.
    """

    threshold: float | None
    tail: str
    is_auto: bool


# ---- which tiles are kept ------------------------------------------------------------------------


class Tiles(NamedTuple):
    """kept (G, T) bool; `residue` (R, T) is the sum of dz over each tile that is not, or None."""

    kept_GT: Tensor
    residue_RT: Tensor | None = None


def num_tiles(num_columns: int) -> int:
    return -(-num_columns // COLUMNS)


def tile_sums(values_RV: Tensor) -> Tensor:
    """(R, V) -> (R, T): sums over tiles of columns, the last of which may be narrow."""
    num_columns = values_RV.shape[1]
    whole = num_columns // COLUMNS * COLUMNS
    sums = values_RV[:, :whole].unflatten(1, (-1, COLUMNS)).sum(-1)
    if whole == num_columns:
        return sums
    return torch.cat([sums, values_RV[:, whole:].sum(-1, keepdim=True)], 1)


def keep_tiles(masses_RT: Tensor, mean_coefficient: Tensor, threshold: float) -> Tensor:
    """(R, T), () -> (G, T) bool. NaN is kept: it is never hidden."""
    light = masses_RT < threshold * mean_coefficient
    rows = -len(light) % ROWS
    if rows:
        light = torch.nn.functional.pad(light, (0, 0, 0, rows), value=True)
    return ~light.unflatten(0, (-1, ROWS)).all(1)


def spread(kept_GT: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """(G, T) -> (R, V) bool: the elements of the kept tiles."""
    rows = kept_GT.repeat_interleave(ROWS, 0)[:num_rows]
    return rows.repeat_interleave(COLUMNS, 1)[:, :num_columns]


# ---- reference -----------------------------------------------------------------------------------


def masked_reference(dlogits_RV: Tensor, kept_GT: Tensor) -> Tensor:
    """The gradient with zeros in the tiles that are not kept."""
    return dlogits_RV * spread(kept_GT, *dlogits_RV.shape)


# ---- products in plain PyTorch -------------------------------------------------------------------


def kept_runs(
    kept_GT: Tensor, num_rows: int, num_columns: int
) -> Iterator[tuple[slice, list[slice]]]:
    """The rows of every group, and the columns that it keeps: a slice for each run of tiles.

    Reads the values of a CPU.
    """
    edges_GT = torch.nn.functional.pad(kept_GT.to(torch.int8), (1, 1)).diff(dim=1)
    for group, edges in enumerate(edges_GT):
        rows = slice(group * ROWS, min((group + 1) * ROWS, num_rows))
        starts, stops = ((edges == sign).nonzero()[:, 0] * COLUMNS for sign in (1, -1))
        runs = zip(starts.tolist(), stops.clamp(max=num_columns).tolist(), strict=True)
        yield rows, [slice(*run) for run in runs]


def hidden_gradient_into(
    out_RD: Tensor, dlogits_RV: Tensor, weight_VD: Tensor, kept_GT: Tensor
) -> None:
    """out = dlogits @ weight over the kept tiles; groups of rows without any become 0.

    A product for each run of tiles: gathering them first costs more than their larger product saves.
    """
    out_RD.zero_()
    for rows, runs in kept_runs(kept_GT, *dlogits_RV.shape):
        out, dlogits = out_RD[rows], dlogits_RV[rows]
        for columns in runs:
            out.addmm_(dlogits[:, columns].to(out.dtype), weight_VD[columns].to(out.dtype))


def weight_gradient_add(
    out_VD: Tensor, dlogits_RV: Tensor, hidden_RD: Tensor, kept_GT: Tensor, *, overwrite: bool
) -> None:
    """out += dlogits.T @ hidden over the kept tiles, or `=` when overwriting."""
    if overwrite:
        out_VD.zero_()
    hidden_RD = hidden_RD.to(out_VD.dtype)
    for rows, runs in kept_runs(kept_GT, *dlogits_RV.shape):
        dlogits_VR, hidden = dlogits_RV[rows].t(), hidden_RD[rows]
        for columns in runs:
            out_VD[columns].addmm_(dlogits_VR[columns].to(out_VD.dtype), hidden)


# ---- dropped tiles, replaced by one number each --------------------------------------------------


def residues(sums_RT: Tensor, kept_GT: Tensor) -> Tensor:
    """(R, T): the sum of dz over each dropped tile, 0 for kept ones."""
    kept = kept_GT.repeat_interleave(ROWS, 0)[: len(sums_RT)]
    return sums_RT.masked_fill(kept, 0.0)


def tile_means(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) -> (T, D): the mean row of each tile of the weight, on a GPU without a copy in `dtype`."""
    whole = len(weight_VD) // COLUMNS * COLUMNS
    means = weight_VD[:whole].unflatten(0, (-1, COLUMNS)).mean(1, dtype=dtype)
    if whole == len(weight_VD):
        return means
    return torch.cat([means, weight_VD[whole:].mean(0, keepdim=True, dtype=dtype)])


class Centroids:
    """dX and dW of dropped tiles as if the rows of W within a tile were equal.

    It restores sum_v dz_v = 0, whose loss pushes every hidden state along the mean embedding. For
    all chunks of one call: W is read and dW written once.
    """

    def __init__(self) -> None:
        self.means_TD: Tensor | None = None  # of W
        self.sums_TD: Tensor | None = None  # of dW

    def of_hidden(self, residue_RT: Tensor, weight_VD: Tensor) -> Tensor:
        """(R, T), (V, D) -> (R, D); `weight_VD` is the same in all calls."""
        if self.means_TD is None:
            self.means_TD = tile_means(weight_VD, residue_RT.dtype)
        return residue_RT @ self.means_TD

    def add_for_weight(self, residue_RT: Tensor, hidden_RD: Tensor) -> None:
        hidden_RD = hidden_RD.to(residue_RT.dtype)
        if self.sums_TD is None:
            self.sums_TD = residue_RT.t() @ hidden_RD
        else:
            self.sums_TD.addmm_(residue_RT.t(), hidden_RD)

    def spread_into(self, out_VD: Tensor) -> None:
        """Add the sum of each tile to dW, evenly over its rows."""
        if self.sums_TD is None:
            return
        whole = len(out_VD) // COLUMNS
        body = out_VD[: whole * COLUMNS].unflatten(0, (-1, COLUMNS))
        body += (self.sums_TD[:whole, None] / COLUMNS).to(out_VD.dtype)
        if whole * COLUMNS < len(out_VD):
            tail = out_VD[whole * COLUMNS :]
            tail += (self.sums_TD[whole] / len(tail)).to(out_VD.dtype)


# ---- the tiles of one call, and the share that is dropped ----------------------------------------


class TileMasses(NamedTuple):
    """sum |dz| of every tile of a chunk, and the mean |c1| of its rows with a gradient.

    `sums` are signed, and None unless the tail needs them.
    """

    masses_RT: Tensor
    sums_RT: Tensor | None
    mean_coefficient: Tensor


def mean_coefficient(c1_R: Tensor, alive_R: Tensor) -> Tensor:
    """(R,), (R,) bool -> (): the mean of |c1| over live rows; NaN counts as 0, and is kept anyway."""
    total = torch.where(alive_R, c1_R.abs(), 0.0).nan_to_num(0.0).sum()
    return total / alive_R.sum().clamp(min=1)


class DensityMemory:
    """Densities copied to the host without a wait: on CUDA one call late."""

    def __init__(self) -> None:
        self.last = 0.0
        self.arriving: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def latest(self, density: Tensor) -> float:
        """The newest density that has arrived; 0 before the first."""
        if runtime.can_read_values(density.device):
            return float(density)
        if torch.cuda.is_current_stream_capturing():
            return self.last
        if self.arriving is None or self.arrived is None:
            self.arriving = torch.zeros((), dtype=density.dtype, pin_memory=True)
            self.arrived = torch.cuda.Event()
        elif self.arrived.query():
            self.last = float(self.arriving)
        else:
            return self.last
        self.arriving.copy_(density, non_blocking=True)
        self.arrived.record()
        return self.last


_MEMORIES: defaultdict[torch.device, DensityMemory] = defaultdict(DensityMemory)


class TileSelector:
    """Chooses the tiles of each chunk of one call, and adds up what was kept and dropped."""

    def __init__(self, sparsity: Sparsity, device: torch.device):
        self.threshold, self.tail, self.is_auto = sparsity
        self.memory = _MEMORIES[device]
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.tiles = self.kept = self.mass = self.skipped = self.alive = zero

    @property
    def wants_masses(self) -> bool:
        return self.threshold is not None

    @property
    def wants_sums(self) -> bool:
        return self.threshold is not None and self.tail == "centroid"

    def count_rows(self, num_alive: int | Tensor) -> None:
        self.alive = self.alive + num_alive

    def select(self, masses: TileMasses | None) -> Tiles | None:
        """The kept tiles of a chunk; None where it is multiplied densely."""
        if masses is None or self.threshold is None:
            return None
        kept = keep_tiles(masses.masses_RT, masses.mean_coefficient, self.threshold)
        density = kept.double().mean()
        self.mass = self.mass + masses.masses_RT.double().sum()
        self.tiles = self.tiles + kept.numel()
        if self.is_auto and self.memory.latest(density) > runtime.BREAK_EVEN_DENSITY:
            self.kept = self.kept + kept.numel()
            return None
        self.kept = self.kept + kept.double().sum()
        self.skipped = self.skipped + residues(masses.masses_RT, kept).double().sum()
        sums = masses.sums_RT
        return Tiles(kept, None if sums is None else residues(sums, kept))

    def metrics(self, num_rows: int) -> Tensor:
        """(3,) float64: density, skipped_mass, rows_skipped."""
        density = torch.where(self.tiles > 0, self.kept / self.tiles.clamp(min=1), 1.0)
        skipped = torch.where(self.mass > 0, self.skipped / self.mass, 0.0)
        return torch.stack([density, skipped, num_rows - self.alive])
