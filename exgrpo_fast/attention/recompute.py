"""Block after block of a pack, at the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Block = TypeVar("Block")


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


def block_by_block(
    attend: Callable[[Block, Tensor, Tensor, Tensor], Tensor],
    blocks: Sequence[Block],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
) -> Tensor:
    """The outputs of all blocks, joined.

    Of several blocks each is made again in the backward pass: what a block gathers from query, key
    and value is then held for one block at a time.
    """
    if len(blocks) == 1:
        return attend(blocks[0], query, key, value)
    made = [
        checkpoint(
            attend,
            block,
            query,
            key,
            value,
            use_reentrant=False,
            preserve_rng_state=dropout > 0,
        )
        for block in blocks
    ]
    return torch.cat(made)
