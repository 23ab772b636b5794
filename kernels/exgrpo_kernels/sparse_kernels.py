"""The Triton products over kept tiles: dX and dW that gather along their inner dimension.

The bitmap of kept tiles becomes one list of tiles per block of output. Lists and their lengths stay
on the device, so the host never waits. A program multiplies the tiles of a list, with the inner
loop of a dense GEMM, and writes its output once: no atomics, deterministic. Longest lists first,
round robin over a persistent grid.

A block of dX whose list is longer than twice the mean is split into segments, so that one block
with many uncertain tokens does not run long after the others; a second pass adds the segments in
order. Lists of dW are short and many, and are never split.

Legend: R rows of a chunk, V vocabulary, D hidden, G groups of ROWS rows, T tiles of COLUMNS
columns, I items (blocks of output), S segments.
"""

# Triton's language has no type stubs.
# pyright: basic, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exgrpo_kernels import runtime
from exgrpo_kernels.sparse_backward import COLUMNS, ROWS

# Rows of one step of the inner loop of dW, and tiles of columns of one of its output blocks.
STEP_ROWS, PAIR = 64, 2

ROW_TILE = tl.constexpr(ROWS)
ROW_STEP = tl.constexpr(STEP_ROWS)
STEPS = tl.constexpr(ROWS // STEP_ROWS)
COLUMN_TILE = tl.constexpr(COLUMNS)


# ---- lists, on the device ------------------------------------------------------------------------


class Lists(NamedTuple):
    """entries (I, K) int32: what each item needs, ascending, first counts[i] of them; order (I,)."""

    entries_IK: Tensor
    counts_I: Tensor
    order_I: Tensor


def lists_of(needed_IK: Tensor) -> Lists:
    """(I, K) bool -> the lists of True columns; `order` sorts items by the length of their list."""
    entries = torch.argsort(~needed_IK, dim=1, stable=True).to(torch.int32)
    counts = needed_IK.sum(1, dtype=torch.int32)
    order = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
    return Lists(entries.contiguous(), counts, order)


class Segments(NamedTuple):
    """item, start, stop, slot of every segment, longest items first; `total` of 2 I are real."""

    items_S: Tensor
    starts_S: Tensor
    stops_S: Tensor
    first_I: Tensor  # each item's first segment
    pieces_I: Tensor  # and how many it has
    total: Tensor


def segments_of(lists: Lists) -> Segments:
    """Cut lists at twice the mean length; at most 2 I segments, and empty lists have none."""
    counts, num_items = lists.counts_I.long(), len(lists.counts_I)
    busy = (counts > 0).sum().clamp(min=1)
    limit = (2 * counts.sum() / busy).ceil().long().clamp(min=1)
    pieces = (counts + limit - 1) // limit
    ordered = pieces[lists.order_I.long()]
    ends = ordered.cumsum(0)
    slots = torch.arange(2 * num_items, device=counts.device)
    place = torch.searchsorted(ends, slots, right=True).clamp(max=num_items - 1)
    items = lists.order_I[place].long()
    index = slots - (ends - ordered)[place]
    starts = index * limit
    first = torch.empty_like(counts).scatter_(0, lists.order_I.long(), ends - ordered)
    return Segments(
        items.to(torch.int32),
        starts.to(torch.int32),
        torch.minimum(starts + limit, counts[items]).to(torch.int32),
        first.to(torch.int32),
        pieces.to(torch.int32),
        ends[-1:].to(torch.int32),
    )


# ---- kernels -------------------------------------------------------------------------------------
# What follows the number of rows changes from step to step and must not start a compilation.


@triton.jit(do_not_specialize=("capacity", "num_rows"))
def hidden_gradient_kernel(
    dlogits,
    dlogits_stride,
    weight,
    weight_stride,
    weight_inner,
    partial,
    entries,
    entries_stride,
    items,
    starts,
    stops,
    total,
    capacity,
    num_rows,
    num_columns,
    num_hidden,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """partial[s] (BLOCK_ROWS, D) = dlogits[rows of item, listed tiles] @ weight[listed tiles]."""
    num_parts = tl.cdiv(num_hidden, BLOCK_HIDDEN)
    num_segments = tl.load(total)
    for work in range(tl.program_id(0), capacity * num_parts, tl.num_programs(0)):
        segment = work // num_parts
        if segment < num_segments:
            item = tl.load(items + segment)
            start = tl.load(starts + segment)
            stop = tl.load(stops + segment)
            tl.assume(stop > start)
            rows = item * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            part = (work % num_parts) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
            row_starts = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride
            sums = tl.zeros([BLOCK_ROWS, BLOCK_HIDDEN], tl.float32)
            list_start = entries + item.to(tl.int64) * entries_stride
            for k in range(start, stop):
                columns = tl.load(list_start + k) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
                inside = columns < num_columns
                a = tl.load(
                    row_starts + columns[None, :],
                    mask=(rows < num_rows)[:, None] & inside[None, :],
                    other=0.0,
                )
                b = tl.load(
                    weight
                    + columns.to(tl.int64)[:, None] * weight_stride
                    + part[None, :] * weight_inner,
                    mask=inside[:, None] & (part < num_hidden)[None, :],
                    other=0.0,
                )
                # a head of another dtype is converted as it is read
                sums = tl.dot(a, b.to(a.dtype), sums, input_precision=PRECISION)
            places = segment.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            tl.store(
                partial + places[:, None] * num_hidden + part[None, :],
                sums,
                mask=(part < num_hidden)[None, :],
            )


@triton.jit(do_not_specialize=("num_rows",))
def add_segments_kernel(
    partial,
    out,
    out_stride,
    first,
    pieces,
    num_rows,
    num_hidden,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out rows = the sum of their item's segments, in order; 0 where there are none."""
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        item = row // BLOCK_ROWS
        segment = tl.load(first + item).to(tl.int64)
        count = tl.load(pieces + item)
        for start in range(0, num_hidden, BLOCK_HIDDEN):
            part = start + tl.arange(0, BLOCK_HIDDEN)
            sums = tl.zeros([BLOCK_HIDDEN], tl.float32)
            for piece in range(0, count):
                place = (segment + piece) * BLOCK_ROWS + row % BLOCK_ROWS
                sums += tl.load(
                    partial + place * num_hidden + part, mask=part < num_hidden, other=0.0
                )
            tl.store(
                out + row * out_stride + part,
                sums.to(out.dtype.element_ty),
                mask=part < num_hidden,
            )


@triton.jit(do_not_specialize=("entries_stride", "num_rows"))
def weight_gradient_kernel(
    dlogits,
    dlogits_stride,
    hidden,
    hidden_stride,
    out,
    out_stride,
    entries,
    entries_stride,
    counts,
    order,
    kept,
    kept_stride,
    num_items,
    num_rows,
    num_columns,
    num_hidden,
    OVERWRITE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out[columns of item] (+)= dlogits[listed rows, columns].T @ hidden[listed rows]."""
    num_parts = tl.cdiv(num_hidden, BLOCK_HIDDEN)
    for work in range(tl.program_id(0), num_items * num_parts, tl.num_programs(0)):
        item = tl.load(order + work // num_parts)
        count = tl.load(counts + item)
        columns = item * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        part = (work % num_parts) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        inside = columns < num_columns
        places = out + columns.to(tl.int64)[:, None] * out_stride + part[None, :]
        mask = inside[:, None] & (part < num_hidden)[None, :]
        if count > 0:
            tl.assume(count > 0)
            sums = tl.zeros([BLOCK_COLUMNS, BLOCK_HIDDEN], tl.float32)
            list_start = entries + item.to(tl.int64) * entries_stride
            for step in range(0, count * STEPS):
                index = tl.cast(step, tl.int32)
                group = tl.load(list_start + index // STEPS)
                first = group * ROW_TILE + index % STEPS * ROW_STEP
                rows = first + tl.arange(0, ROW_STEP)
                real = rows < num_rows
                # the item has two tiles of columns, of which this group may keep one
                own = tl.load(
                    kept + group.to(tl.int64) * kept_stride + columns // COLUMN_TILE,
                    mask=inside,
                    other=0,
                )
                a = tl.load(
                    dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + columns[None, :],
                    mask=real[:, None] & (own != 0)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    hidden + rows.to(tl.int64)[:, None] * hidden_stride + part[None, :],
                    mask=real[:, None] & (part < num_hidden)[None, :],
                    other=0.0,
                )
                sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
            if not OVERWRITE:
                sums += tl.load(places, mask=mask, other=0.0)
            tl.store(places, sums, mask=mask)
        elif OVERWRITE:
            tl.store(places, tl.zeros([BLOCK_COLUMNS, BLOCK_HIDDEN], tl.float32), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact, not tf32; for narrower operands it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"


def launch(kernel, num_work: int, device: torch.device, *arguments, **constants) -> None:
    if num_work > 0:
        with runtime.current_device(device):
            kernel[(min(num_work, runtime.num_programs(device)),)](*arguments, **constants)


def hidden_gradient_into(
    out_RD: Tensor, dlogits_RV: Tensor, weight_VD: Tensor, kept_GT: Tensor
) -> None:
    """out = dlogits @ weight over the kept tiles, in the dtype of `dlogits`; any dtypes."""
    lists = lists_of(kept_GT)
    segments = segments_of(lists)
    num_items, num_hidden = len(lists.counts_I), weight_VD.shape[1]
    shape = runtime.sparse_kernel_shape(num_hidden, dlogits_RV.dtype, out_RD.device)
    # a head that is converted as it is read leaves no registers for loads ahead: they would spill
    num_stages = shape.num_stages if weight_VD.dtype == dlogits_RV.dtype else 1
    capacity, block_rows = 2 * num_items, ROWS
    partial = out_RD.new_empty(capacity * block_rows, num_hidden, dtype=torch.float32)
    launch(
        hidden_gradient_kernel,
        capacity * triton.cdiv(num_hidden, shape.block_hidden),
        out_RD.device,
        dlogits_RV,
        dlogits_RV.stride(0),
        weight_VD,
        weight_VD.stride(0),
        weight_VD.stride(1),
        partial,
        lists.entries_IK,
        lists.entries_IK.stride(0),
        segments.items_S,
        segments.starts_S,
        segments.stops_S,
        segments.total,
        capacity,
        len(dlogits_RV),
        dlogits_RV.shape[1],
        num_hidden,
        PRECISION=precision(dlogits_RV.dtype),
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=shape.block_hidden,
        num_warps=shape.num_warps,
        num_stages=num_stages,
    )
    launch(
        add_segments_kernel,
        len(out_RD),
        out_RD.device,
        partial,
        out_RD,
        out_RD.stride(0),
        segments.first_I,
        segments.pieces_I,
        len(out_RD),
        num_hidden,
        BLOCK_ROWS=block_rows,
        BLOCK_HIDDEN=shape.block_hidden,
        num_warps=4,
    )


def weight_gradient_add(
    out_VD: Tensor, dlogits_RV: Tensor, hidden_RD: Tensor, kept_GT: Tensor, *, overwrite: bool
) -> None:
    """out += dlogits.T @ hidden over the kept tiles, or `=` when overwriting; out is float32."""
    pairs = torch.nn.functional.pad(kept_GT, (0, kept_GT.shape[1] % PAIR))
    lists = lists_of(pairs.unflatten(1, (-1, PAIR)).any(2).t())
    num_items, num_hidden = len(lists.counts_I), hidden_RD.shape[1]
    shape = runtime.sparse_kernel_shape(num_hidden, hidden_RD.dtype, out_VD.device)
    # half as wide as for dX: reading what it adds to takes registers, and the whole width spills
    block_hidden = shape.block_hidden // 2
    launch(
        weight_gradient_kernel,
        num_items * triton.cdiv(num_hidden, block_hidden),
        out_VD.device,
        dlogits_RV,
        dlogits_RV.stride(0),
        hidden_RD,
        hidden_RD.stride(0),
        out_VD,
        out_VD.stride(0),
        lists.entries_IK,
        lists.entries_IK.stride(0),
        lists.counts_I,
        lists.order_I,
        kept_GT.contiguous(),
        kept_GT.shape[1],
        num_items,
        len(dlogits_RV),
        dlogits_RV.shape[1],
        num_hidden,
        OVERWRITE=overwrite,
        PRECISION=precision(hidden_RD.dtype),
        BLOCK_COLUMNS=PAIR * COLUMNS,
        BLOCK_HIDDEN=block_hidden,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
