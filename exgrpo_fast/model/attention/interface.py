"""The way in: what the layers of a transformers model call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from exgrpo_fast.model.attention.backends import PackedAttention

ATTENTION = "exgrpo_packed"
# By the public registries: the modules that hold these functions move between releases.
sdpa_attention_forward = AttentionInterface()["sdpa"]
sdpa_mask = AttentionMaskInterface()["sdpa"]


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, L, head size]
    key: Tensor,  # [1, key heads, L, head size]
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within one pack; generation, which is no `packed` forward, goes to SDPA.

    Takes and returns what transformers' attention interface asks for: [1, L, heads, head size].
    """
    if packed is None:
        return sdpa_attention_forward(  # pyright: ignore[reportReturnType]
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    # Under autocast, rotated queries and keys are float32 again; the values never are.
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out = packed(query, key, value, scaling=scaling, window=sliding_window, dropout=dropout)
    return out[None], None


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Generation brings a 2-D mask and gets SDPA's; a packed forward brings none and needs none."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)
