"""Side by side: torch's scaled_dot_product_attention, on any device and in any dtype.

Each completion is laid behind a copy of its prompt's queries, keys and values, right-padded, so that
plain causality hides the padding. Outputs are taken back from the completions and, once for each
prompt, from its first completion.

Legend of shapes: that of layout.py, and
    B   sequences of a block
    C   its longest sequence
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.model.attention.blocks import Block, block_by_block
from exgrpo_fast.model.attention.layout import AttentionLayout, Scoring


@dataclass(frozen=True)
class SideBySideBlock(Block):
    """Sequences of similar length; padding reads row 0 of the pack."""

    shape: tuple[int, int]  # B, C
    taken: Tensor  # int64, the places in [B * C] whose outputs are answers
    windows: dict[int, Tensor] = field(default_factory=dict)  # bool [C, C] of each window

    def window(self, size: int | None) -> Tensor | None:
        """None where plain causality says the same."""
        width = self.shape[1]
        if size is None or size >= width:
            return None
        if size not in self.windows:
            columns = torch.arange(width, device=self.taken.device)
            distance = columns[:, None] - columns
            self.windows[size] = (distance >= 0) & (distance < size)
        return self.windows[size]


class SideBySide:
    """The `sdpa` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        lengths = layout.sequence_lengths[layout.asking]
        members = similar_lengths(lengths, num_tokens=layout.num_tokens)
        self.blocks = [lay_out(layout, layout.asking[of_block], device) for of_block in members]

    def __call__(
        self,
        query: Tensor,  # [L, heads, head size]
        key: Tensor,  # [L, key heads, head size]
        value: Tensor,
        scoring: Scoring,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[L, heads, head size]."""
        return block_by_block(attend, self.blocks, query, key, value, scoring, sinks)


def attend(
    block: SideBySideBlock,
    query: Tensor,  # [B * C, heads, head size]
    key: Tensor,  # [B * C, key heads, head size]
    value: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """[answered, heads, head size]."""
    mask = block.window(scoring.window)
    # Fused kernels then want as many key heads as heads; the one that shares them takes no float32,
    # and without any SDPA would hold all scores [B, heads, C, C].
    wants_all_heads = query.is_cuda and query.dtype == torch.float32
    if mask is not None or sinks is not None or wants_all_heads:
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    query, key, value = (x.unflatten(0, block.shape).transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {"is_causal": mask is None, "dropout_p": scoring.dropout}
    if sinks is not None:
        # A query in front for the sink's key in front: the mask stays square, and causal.
        mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
        query = F.pad(query, (0, 0, 1, 0))
        out = attend_with_sinks(
            query, key, value, sinks, mask=mask, scaling=scoring.scaling, **options
        )[:, :, 1:]
    else:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            scale=scoring.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            **options,
        )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, block.taken)


def attend_with_sinks(
    query: Tensor,  # [B, heads, Q, head size]
    key: Tensor,  # [B, heads, K, head size]
    value: Tensor,
    sinks: Tensor,  # [heads]
    *,
    mask: Tensor | None,  # bool, broadcast to [B, heads, Q, K + 1], the sink first; None = all
    scaling: float | None,
    **options: Any,
) -> Tensor:
    """[B, heads, Q, head size]: softmax over [sink, scores], of which the sink has the value 0.

    The sink becomes a key in front whose score is the same for every query: queries get one more
    dimension of 1, keys one of 0, and that of the sink's key is sink / scaling.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size, more = key.shape[-1], 8  # fused kernels want head sizes that 8 divides
    query = F.pad(query, (0, more))
    query[..., size] = 1.0
    in_front = F.pad((sinks / scale).to(key.dtype)[None, :, None, None], (size, more - 1))
    key = torch.cat([in_front.expand(len(key), -1, -1, -1), F.pad(key, (0, more))], dim=2)
    width = value.shape[-1]
    value = F.pad(value, (0, key.shape[-1] - width, 1, 0))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, **options)
    return out[..., :width]


# --- indices, on the CPU --------------------------------------------------------------------------


def similar_lengths(lengths_S: Tensor, *, num_tokens: int) -> list[Tensor]:
    """Sequences in blocks, longest first, with their padding at most as large as the pack.

    Several blocks are half as large each: the pack's own queries, keys and values are kept beside
    them. A sequence that is longer stands alone.
    """
    order = lengths_S.argsort(descending=True, stable=True)
    whole = len(order) * int(lengths_S.max())
    capacity = num_tokens if whole <= num_tokens else num_tokens // 2
    blocks, start = [], 0
    while start < len(order):
        stop = start + max(1, capacity // int(lengths_S[order[start]]))
        blocks.append(order[start:stop])
        start = stop
    return blocks


def lay_out(layout: AttentionLayout, members_B: Tensor, device: torch.device) -> SideBySideBlock:
    prompt_of = layout.prompt_of[members_B]
    prompts = layout.prompt_lengths[prompt_of][:, None]
    ends = layout.sequence_lengths[members_B][:, None]
    columns = torch.arange(int(ends.max()))
    in_prompt = layout.prompt_starts[prompt_of][:, None] + columns
    in_completion = layout.completion_starts[members_B][:, None] + columns - prompts
    source_BC = torch.where(columns < prompts, in_prompt, in_completion)
    source_BC = torch.where(columns < ends, source_BC, 0)
    answers_BC = (columns < ends) & ((columns >= prompts) | layout.is_first[members_B][:, None])
    taken = answers_BC.flatten().nonzero()[:, 0]
    taken = taken[source_BC.flatten()[taken].argsort()]  # a block that is alone answers in order
    source, answered, taken = to_device(
        [source_BC.flatten(), source_BC.flatten()[taken], taken], device
    )
    return SideBySideBlock(
        query_rows=source,
        key_rows=source,
        answered=answered,
        shape=(len(members_B), len(columns)),
        taken=taken,
    )
