"""Everything that depends on the device: backend, chunk size, the three GEMMs, device asserts.
Shapes: R rows of one chunk, V vocabulary, D hidden.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # here, not in a compiled graph

# ---- sizes on a GPU: predictions of the roofline until a GPU has measured them -------------------
# 4096 rows of bfloat16 logits of a 152k vocabulary; beside it only the dW accumulator is held.
CUDA_CHUNK_BYTES = 1280 * 2**20
# Rows of a GEMM tile; the last chunk is padded to a multiple.
ROW_GRANULE = 128
# Columns and warps of the row kernel: 8 KiB to 16 KiB of a row in flight in each program.
ROW_BLOCK, ROW_WARPS = 4096, 8
ROW_REGISTERS = 128
# Of a multiprocessor of compute capability 8.9, the smallest that is compiled for.
LEAST_SHARED_BYTES = 101_376
# Above this density sparse products lose to dense ones (predicted: 0.6 on an H200; CPU: 0.8).
BREAK_EVEN_DENSITY = 0.5
# Below this vocabulary sparse products cannot pay, and "auto" is dense.
SPARSE_VOCABULARY = 8192

# ---- sizes on a CPU ------------------------------------------------------------------------------

# The chunk of logits [R, V] is sized in bytes. 48 MiB is 384 float32 rows of a 32k vocabulary,
# where the three GEMMs are within 5 % of their rate at 4096 rows (AVX-512, 2 cores; 320 rows:
# 8 %, 192 rows: 23 %, 64 rows: a half slower).
CHUNK_BYTES = 48 * 2**20
# Below this many rows the GEMMs mostly re-read the weight, so a large vocabulary may exceed
# CHUNK_BYTES to reach it, up to LARGEST_CHUNK_BYTES.
EFFICIENT_ROWS = 384
LARGEST_CHUNK_BYTES = 256 * 2**20
# Passes that need scratch walk the chunk in blocks, three to a full chunk. Smaller blocks are no
# faster on an idle CPU and much slower on a shared one, as every pass ends in a wait for all cores
# (2 busy cores: blocks of 4 MiB 6.8 s, 16 MiB 4.2 s for the loss of bench/loss.py; idle: 1.5 s).
BLOCK_BYTES = 14 * 2**20
# A low-precision weight is upcast tile by tile, never as a whole.
TILE_BYTES = 8 * 2**20


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run: "auto" is Triton on CUDA devices, PyTorch elsewhere.

    "triton" on a CPU needs Triton's interpreter; float64 is PyTorch's alone.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = None
    if not HAS_TRITON:
        reason = "the package triton is not installed"
    elif dtype == torch.float64:
        reason = "its kernels have no float64"
    elif device.type != "cuda" and not is_interpreting():
        reason = f"tensors are on {device} and TRITON_INTERPRET=1 was not set before the import"
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' cannot run here: {reason}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and reason is None else "torch"
    return backend


def is_interpreting() -> bool:
    """Whether Triton kernels run as Python on CPU tensors; it is fixed when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


# ---- sizes ---------------------------------------------------------------------------------------


def chunk_rows(num_rows: int, row_bytes: int, device: torch.device) -> int:
    """How many rows of logits one chunk holds, given the bytes of one row."""
    if device.type == "cuda":
        most = max(ROW_GRANULE, CUDA_CHUNK_BYTES // row_bytes // ROW_GRANULE * ROW_GRANULE)
        return min(most, -(-max(num_rows, 1) // ROW_GRANULE) * ROW_GRANULE)
    fitting = max(CHUNK_BYTES // row_bytes, min(EFFICIENT_ROWS, LARGEST_CHUNK_BYTES // row_bytes))
    return max(1, min(num_rows, fitting))


def padded_rows(num_rows: int, chunk_rows: int, device: torch.device) -> int:
    """How many rows the GEMMs of the last chunk have.

    Multiples of a tile keep the kernels of the BLAS few; all of the chunk, when algorithms are to
    be deterministic, makes a row's bits independent of how many others come with it.
    """
    if torch.are_deterministic_algorithms_enabled():
        return chunk_rows
    return min(chunk_rows, -(-num_rows // ROW_GRANULE) * ROW_GRANULE)


def block_rows(num_rows: int, row_bytes: int) -> int:
    """How many rows one elementwise block holds."""
    return max(1, min(num_rows, BLOCK_BYTES // row_bytes))


class RowKernelShape(NamedTuple):
    """Columns per block, warps per program, registers per thread at most.

    Left alone, ptxas aims at an occupancy that a persistent kernel has no use for, and spills.
    """

    block: int
    num_warps: int
    max_registers: int = ROW_REGISTERS


def row_kernel_shape(num_columns: int) -> RowKernelShape:
    """Columns per block and warps per program for rows of `num_columns`."""
    block = ROW_BLOCK
    while block > 128 and block // 2 >= num_columns:
        block //= 2
    return RowKernelShape(block, max(1, min(ROW_WARPS, block // 256)))


class SparseKernelShape(NamedTuple):
    """Columns of the hidden size per block, warps, stages of the pipeline."""

    block_hidden: int
    num_warps: int
    num_stages: int


def sparse_kernel_shape(
    num_hidden: int, dtype: torch.dtype, device: torch.device
) -> SparseKernelShape:
    """Blocks of 128 x 256 in bfloat16, as deep a pipeline as shared memory holds."""
    shared = LEAST_SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin
    return sparse_shape_for(num_hidden, dtype.itemsize, shared)


def sparse_shape_for(num_hidden: int, itemsize: int, shared_bytes: int) -> SparseKernelShape:
    block = 256 if itemsize == 2 else 32
    while block > 32 and block // 2 >= num_hidden:
        block //= 2
    stage_bytes = 64 * (128 + block) * itemsize
    return SparseKernelShape(block, 8, max(1, min(3, shared_bytes // stage_bytes)))


def num_programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one per multiprocessor, a few in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def empty_logits(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device):
    """An uninitialised [R, V] buffer whose rows do not all start in the same cache set.

    On a CPU a row length that is a multiple of the page (every power-of-two vocabulary) makes the
    transposed read of the dW GEMM collide; one cache line of padding makes it 8 % faster. On a
    GPU rows start at multiples of 128 bytes whatever the vocabulary, as the fast GEMMs want.
    """
    padding, row_bytes = 0, num_columns * dtype.itemsize
    if device.type == "cuda":
        padding = -row_bytes % 128 // dtype.itemsize
    elif row_bytes % 4096 == 0:
        padding = 64 // dtype.itemsize
    buffer = torch.empty(num_rows, num_columns + padding, dtype=dtype, device=device)
    return buffer[:, :num_columns]


def can_read_values(device: torch.device) -> bool:
    """Whether the host may read tensor values: on a CPU, and in debug mode despite the wait."""
    return device.type == "cpu" or os.environ.get("EXGRPO_KERNELS_DEBUG") == "1"


def is_free_to_read(value: Tensor) -> bool:
    """Whether the host may read `value`; a compiled graph cannot branch on it."""
    return can_read_values(value.device) and not torch.compiler.is_compiling()


def require(condition: Tensor, message: str) -> None:
    """Check a 0-d bool tensor: ValueError on a CPU, device-side assert (no sync) elsewhere.

    A compiled graph asserts everywhere (RuntimeError): it cannot branch on values.
    """
    if is_free_to_read(condition):
        if not bool(condition):
            raise ValueError(message)
    elif condition.device.type in ("cpu", "cuda"):
        torch._assert_async(condition, message)


# ---- the three GEMMs of a linear layer, accumulated in float32 -----------------------------------


def gemm_dtype(
    hidden: Tensor, weight: Tensor, compute: torch.dtype, *, is_triton: bool
) -> torch.dtype:
    """The operand dtype: bfloat16 where it is accumulated in float32, else `compute`.

    Never float16: coefficients divided by token counts underflow its range. The interpreter uses
    the dtype that a GPU would.
    """
    low = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if low and (hidden.is_cuda or is_triton) else compute


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
    elif dlogits_RV.is_cuda:
        torch.addmm(
            out_VD, dlogits_RV.t(), hidden_RD, out_dtype=out_VD.dtype, beta=beta, out=out_VD
        )
    else:
        out_VD.addmm_(dlogits_RV.t().to(out_VD.dtype), hidden_RD.to(out_VD.dtype), beta=beta)
