"""What the machine can do: the backend, the size of a chunk, three GEMMs and the device assert.

The only file that looks at devices; the mathematics above it is the same everywhere.
Shapes: R rows of one chunk, V vocabulary, D hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")

# The chunk of logits [R, V] is sized in bytes. 40 MiB is 320 float32 rows of a 32k vocabulary,
# where the three GEMMs are within 8 % of their rate at 4096 rows (AVX-512, 2 cores; 384 rows:
# 5 %, 192 rows: 23 %, 64 rows: a half slower).
CHUNK_BYTES = 40 * 2**20
# Below this many rows the GEMMs mostly re-read the weight, so a large vocabulary may exceed
# CHUNK_BYTES to reach it, up to LARGEST_CHUNK_BYTES.
EFFICIENT_ROWS = 320
LARGEST_CHUNK_BYTES = 256 * 2**20
# Passes that need scratch walk the chunk in blocks, three to a full chunk. Smaller blocks are no
# faster on an idle CPU and much slower on a shared one, as every pass ends in a wait for all cores
# (2 busy cores: blocks of 4 MiB 6.8 s, 16 MiB 4.2 s for the loss of bench/loss.py; idle: 1.5 s).
BLOCK_BYTES = 14 * 2**20
# A low-precision weight is upcast tile by tile, never as a whole.
TILE_BYTES = 8 * 2**20


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run: "torch" is the only one in this build."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        raise ValueError(
            f"backend='triton' is not available on {device} in this build: "
            "accepted are 'auto' and 'torch'"
        )
    return "torch"


def chunk_rows(num_rows: int, row_bytes: int) -> int:
    """How many rows of logits one chunk holds, given the bytes of one row."""
    fitting = max(CHUNK_BYTES // row_bytes, min(EFFICIENT_ROWS, LARGEST_CHUNK_BYTES // row_bytes))
    return max(1, min(num_rows, fitting))


def block_rows(num_rows: int, row_bytes: int) -> int:
    """How many rows one elementwise block holds."""
    return max(1, min(num_rows, BLOCK_BYTES // row_bytes))


def empty_logits(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device):
    """An uninitialised [R, V] buffer whose rows do not all start in the same cache set.

    A row length that is a multiple of the page (every power-of-two vocabulary) makes the
    transposed read of the dW GEMM collide; one cache line of padding makes it 8 % faster.
    """
    padding = 0
    if device.type == "cpu" and (num_columns * dtype.itemsize) % 4096 == 0:
        padding = 64 // dtype.itemsize
    buffer = torch.empty(num_rows, num_columns + padding, dtype=dtype, device=device)
    return buffer[:, :num_columns]


def can_read_values(device: torch.device) -> bool:
    """Whether the host may look at tensor values without waiting for a device."""
    return device.type == "cpu"


def require(condition: Tensor, message: str) -> None:
    """Check a 0-d bool tensor: ValueError on a CPU, device-side assert (no sync) elsewhere."""
    if can_read_values(condition.device):
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type == "cuda":
        torch._assert_async(condition, message)


# ---- the three GEMMs of a linear layer, accumulated in float32 -----------------------------------


def gemm_dtype(hidden: Tensor, weight: Tensor, compute: torch.dtype) -> torch.dtype:
    """The operand dtype: bfloat16 where tensor cores accumulate it in float32, else `compute`.

    float16 stays out: coefficients divided by token counts underflow its range.
    """
    low = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if low and hidden.is_cuda else compute


def _upcast_tiles(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, TILE_BYTES // max(1, weight_VD.shape[1] * dtype.itemsize))
    for start in range(0, weight_VD.shape[0], step):
        tile = slice(start, start + step)
        yield tile, weight_VD[tile].to(dtype)


def logits_into(out_RV: Tensor, hidden_RD: Tensor, weight_VD: Tensor) -> None:
    """out = hidden @ weight.T, with the dtype of `out`."""
    if hidden_RD.dtype == weight_VD.dtype == out_RV.dtype:
        torch.mm(hidden_RD, weight_VD.t(), out=out_RV)
    elif hidden_RD.dtype == weight_VD.dtype and hidden_RD.is_cuda:
        torch.mm(hidden_RD, weight_VD.t(), out_dtype=out_RV.dtype, out=out_RV)
    else:
        hidden_RD = hidden_RD.to(out_RV.dtype)
        for tile, weight in _upcast_tiles(weight_VD, out_RV.dtype):
            torch.mm(hidden_RD, weight.t(), out=out_RV[:, tile])


def hidden_gradient_into(out_RD: Tensor, dlogits_RV: Tensor, weight_VD: Tensor) -> None:
    """out = dlogits @ weight, with the dtype of `out`."""
    if dlogits_RV.dtype == weight_VD.dtype == out_RD.dtype:
        torch.mm(dlogits_RV, weight_VD, out=out_RD)
    elif dlogits_RV.dtype == weight_VD.dtype and dlogits_RV.is_cuda:
        torch.mm(dlogits_RV, weight_VD, out_dtype=out_RD.dtype, out=out_RD)
    else:
        out_RD.zero_()
        for tile, weight in _upcast_tiles(weight_VD, out_RD.dtype):
            out_RD.addmm_(dlogits_RV[:, tile], weight)


def weight_gradient_add(
    out_VD: Tensor, dlogits_RV: Tensor, hidden_RD: Tensor, *, overwrite: bool
) -> None:
    """out += dlogits.T @ hidden, or `=` when overwriting; operands share one dtype."""
    beta = 0 if overwrite else 1
    if dlogits_RV.dtype == out_VD.dtype:
        out_VD.addmm_(dlogits_RV.t(), hidden_RD, beta=beta)
    else:
        torch.addmm(
            out_VD, dlogits_RV.t(), hidden_RD, out_dtype=out_VD.dtype, beta=beta, out=out_VD
        )
