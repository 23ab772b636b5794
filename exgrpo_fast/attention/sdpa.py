"""Side by side: torch's scaled_dot_product_attention, on any device and in any dtype.

Each response is laid behind a copy of its prompt's queries, keys and values, right-padded, so that
plain causality hides the padding. Outputs are taken back from the responses and, once for each
prompt, from its first response.

Legend of shapes: that of layout.py, and
    B   sequences of a block
    C   its longest sequence
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from exgrpo_fast.attention.layout import AttentionLayout
from exgrpo_fast.attention.recompute import block_by_block


@dataclass(frozen=True)
class Block:
    """Sequences of similar length."""

    source_BC: Tensor  # int64, the row of the pack that each place reads; padding reads row 0
    taken: Tensor  # int64, the places in [B * C] whose outputs are kept
    windows: dict[int, Tensor] = field(default_factory=dict)  # bool [C, C] of each window

    def window(self, size: int | None) -> Tensor | None:
        """None where plain causality says the same."""
        width = self.source_BC.shape[1]
        if size is None or size >= width:
            return None
        if size not in self.windows:
            columns = torch.arange(width, device=self.source_BC.device)
            distance = columns[:, None] - columns
            self.windows[size] = (distance >= 0) & (distance < size)
        return self.windows[size]


class SideBySide:
    """The `sdpa` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        lengths = layout.sequence_lengths[layout.asking]
        blocks = similar_lengths(lengths, capacity=layout.num_tokens)
        made = [lay_out(layout, layout.asking[members]) for members in blocks]
        self.blocks = [Block(source.to(device), taken.to(device)) for source, taken, _ in made]
        rows = torch.cat([rows for _, _, rows in made])
        self.back_L = rows.argsort().to(device)

    def __call__(
        self,
        query: Tensor,  # [L, heads, head size]
        key: Tensor,  # [L, key heads, head size]
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
    ) -> Tensor:
        """[L, heads, head size]."""
        attend = partial(_attend, scaling=scaling, window=window, dropout=dropout)
        out = block_by_block(attend, self.blocks, query, key, value, dropout=dropout)
        return out.index_select(0, self.back_L)


def _attend(
    block: Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """The kept outputs of one block, [taken, heads, head size]."""
    mask = block.window(window)
    if mask is not None:  # with a mask the fused kernels want as many key heads as heads
        key, value = (_for_each_head(x, query.shape[1]) for x in (key, value))
    out = F.scaled_dot_product_attention(
        *(side_by_side(x, block.source_BC) for x in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, block.taken)


def side_by_side(x: Tensor, source_BC: Tensor) -> Tensor:
    """[L, heads, head size] -> [B, heads, C, head size]."""
    rows = x.index_select(0, source_BC.flatten())
    return rows.unflatten(0, source_BC.shape).transpose(1, 2)


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


# --- indices, on the CPU --------------------------------------------------------------------------


def similar_lengths(lengths_S: Tensor, *, capacity: int) -> list[Tensor]:
    """Sequences in blocks, longest first, each of at most `capacity` places, padding included.

    A sequence that is longer stands alone.
    """
    order = lengths_S.argsort(descending=True, stable=True)
    blocks, start = [], 0
    while start < len(order):
        longest = int(lengths_S[order[start]])
        stop = start + max(1, capacity // longest)
        blocks.append(order[start:stop])
        start = stop
    return blocks


def lay_out(layout: AttentionLayout, members_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(source [B, C], taken [T], the rows of the pack [T] whose outputs are taken) of one block."""
    prompt_of = layout.prompt_of[members_B]
    prompts = layout.prompt_lengths[prompt_of][:, None]
    ends = layout.sequence_lengths[members_B][:, None]
    columns = torch.arange(int(ends.max()))
    in_prompt = layout.prompt_starts[prompt_of][:, None] + columns
    in_response = layout.response_starts[members_B][:, None] + columns - prompts
    source_BC = torch.where(columns < prompts, in_prompt, in_response)
    source_BC = torch.where(columns < ends, source_BC, 0)
    kept_BC = (columns < ends) & ((columns >= prompts) | layout.is_first[members_B][:, None])
    return source_BC, kept_BC.flatten().nonzero()[:, 0], source_BC[kept_BC]
