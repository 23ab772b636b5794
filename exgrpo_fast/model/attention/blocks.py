"""Block after block of a pack, at the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from exgrpo_fast.model.attention.layout import Scoring


@dataclass(frozen=True)
class Block:
    """What one call of a kernel reads, as rows of the pack, and the rows that it answers."""

    query_rows: Tensor | slice  # int64
    key_rows: Tensor  # int64, of the values as well
    answered: Tensor | slice  # int64, one for each output

    def gather(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _rows(query, self.query_rows),
            _rows(key, self.key_rows),
            _rows(value, self.key_rows),
        )


OneBlock = TypeVar("OneBlock", bound=Block)
# (block, its queries, its keys, its values, scoring, sinks) -> its outputs, [answered, heads, head size]
Attend = Callable[[OneBlock, Tensor, Tensor, Tensor, Scoring, Tensor | None], Tensor]


def block_by_block(
    attend: Attend[OneBlock],
    blocks: Sequence[OneBlock],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """The outputs of all blocks, in the order of the pack.

    Several blocks are made again in the backward pass, one at a time, so that what they gather is
    held for one of them alone. With dropout, whose noise would be another, they are kept.
    """
    if len(blocks) > 1 and not scoring.dropout:
        return _Remade.apply(attend, blocks, scoring, query, key, value, sinks)  # pyright: ignore
    made = [attend(block, *block.gather(query, key, value), scoring, sinks) for block in blocks]
    if len(blocks) == 1:
        return made[0]
    places = torch.arange(len(query), device=query.device)
    answered = torch.cat([_rows(places, block.answered) for block in blocks])
    return torch.cat(made).index_select(0, answered.argsort())


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attend: Attend[OneBlock],
        blocks: Sequence[OneBlock],
        scoring: Scoring,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        ctx.attend, ctx.blocks, ctx.scoring = attend, blocks, scoring
        ctx.save_for_backward(query, key, value, sinks)
        out = value.new_empty(*query.shape[:2], value.shape[2])
        for block in blocks:
            out[block.answered] = attend(block, *block.gather(query, key, value), scoring, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # asked for once: a checkpoint around this gives them once
        *saved, sinks = ctx.saved_tensors
        totals = [torch.zeros_like(x) for x in saved]
        total_sinks = None if sinks is None else torch.zeros_like(sinks)
        for block in ctx.blocks:
            inputs = [x.detach().requires_grad_() for x in block.gather(*saved)]
            own = [] if sinks is None else [sinks.detach().requires_grad_()]
            with torch.enable_grad():
                out = ctx.attend(block, *inputs, ctx.scoring, *(own or [None]))
            found = torch.autograd.grad(out, inputs + own, _rows(grads[0], block.answered))
            del out, inputs
            rows = (block.query_rows, block.key_rows, block.key_rows)
            for total, part, of_part in zip(totals, found, rows, strict=False):
                _add_rows(total, of_part, part)
            if total_sinks is not None:
                total_sinks += found[-1]
        return None, None, None, *totals, total_sinks


def _rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _add_rows(total: Tensor, rows: Tensor | slice, part: Tensor) -> None:
    if isinstance(rows, slice):
        total[rows] += part
    else:
        total.index_add_(0, rows, part)


def greedy_blocks(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """The places of `sizes` in runs whose sum is at most `capacity`; a larger one stands alone."""
    blocks: list[list[int]] = []
    used = 0
    for place, size in enumerate(sizes):
        if not blocks or used + size > capacity:
            blocks.append([])
            used = 0
        blocks[-1].append(place)
        used += size
    return blocks
