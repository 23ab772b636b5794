"""The way in: what the layers of a transformers model call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.attention.backends import PackedAttention
from exgrpo_fast.model.attention.layout import Scoring
from exgrpo_fast.model.attention.sdpa import attend_with_sinks

ATTENTION = "exgrpo_packed"
READY_MASK_SHAPE = (1, 1, 1, 1)
# By the public registries: the modules that hold these functions move between releases.
sdpa_attention_forward = AttentionInterface()["sdpa"]
sdpa_mask = AttentionMaskInterface()["sdpa"]

# Tensors that a layer may hand over although they change nothing here: a pack has its own positions.
_IGNORED = {"position_ids", "cache_position"}


@dataclass
class PackedCall:
    """What a packed forward hands to its layers."""

    attention: PackedAttention
    num_calls: int = 0


@dataclass
class Windows:
    """What the mask of a layer hides beside the future, and what the layer says of it."""

    masks: list[tuple[Tensor, int | None]] = field(default_factory=list)  # with their windows
    layers: dict[int, int | None] = field(default_factory=dict)  # window of each layer

    def compare(self, module: nn.Module, mask: Tensor | None, window: int | None) -> None:
        """UnsupportedAttention where the layer hands over another window than its mask has: in a pack
        the window alone counts."""
        for known, size in self.masks:
            is_same = mask is not None and mask.data_ptr() == known.data_ptr()
            if is_same and size != window:
                sees = [f"{n} tokens" if n else "all tokens" for n in (size, window)]
                raise UnsupportedAttention(
                    f"{type(module).__name__} sees {sees[0]} by its mask, and {sees[1]} by what it "
                    f"hands to its attention: not supported"
                )
        if (layer := getattr(module, "layer_idx", None)) is not None:
            self.layers[layer] = window


_WINDOWS: ContextVar[Windows | None] = ContextVar("windows", default=None)


@contextmanager
def compared_windows() -> Iterator[Windows]:
    """Inside, calls with a 2-D mask fail where the windows of masks and layers differ."""
    token = _WINDOWS.set(windows := Windows())
    try:
        yield windows
    finally:
        _WINDOWS.reset(token)


class UnsupportedAttention(UserError):
    """A layer asks for something that attention within a pack does not have."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, Q, head size]; packed: B = 1, Q = L
    key: Tensor,  # [B, key heads, K, head size]; packed: B = 1, K = L
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedCall | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,  # [heads], attention sinks
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within one pack; generation, which is no `packed` forward, goes to SDPA.

    Takes and returns what transformers' attention interface asks for: [B, Q, heads, head size].
    UnsupportedAttention where a layer wants more than is known here: dropped in silence, it would
    make another model.
    """
    if packed is None and (windows := _WINDOWS.get()) is not None:
        windows.compare(module, attention_mask, sliding_window)
    if packed is None and s_aux is not None:
        return _sdpa_with_sinks(query, key, value, attention_mask, s_aux, scaling, dropout), None
    if packed is None and attention_mask is not None and query.shape[2] == 1:
        return one_token_attention(query, key, value, attention_mask, scaling), None
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
    _refuse_more(module, attention_mask, kwargs)
    # Under autocast, rotated queries and keys are float32 again; the values never are.
    query, key = query.to(value.dtype), key.to(value.dtype)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    packed.num_calls += 1
    scoring = Scoring(scaling, sliding_window, dropout)
    out = packed.attention(query, key, value, scoring, s_aux)
    return out[None], None


def _refuse_more(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    layer = type(module).__name__
    if attention_mask is not None and attention_mask.shape != READY_MASK_SHAPE:
        raise UnsupportedAttention(f"{layer} makes an attention mask of its own: not supported")
    if kwargs.get("is_causal") is False:
        raise UnsupportedAttention(f"{layer} is not causal: not supported")
    for name, value in kwargs.items():
        if (isinstance(value, Tensor) and name not in _IGNORED) or (name == "softcap" and value):
            raise UnsupportedAttention(f"{layer} hands {name} to its attention: not supported")


def _sdpa_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # bool [B, 1, Q, K]; None: plain causality
    sinks: Tensor,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """[B, Q, heads, head size]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    out = attend_with_sinks(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        sinks,
        mask=mask,
        scaling=scaling,
        dropout_p=dropout,
    )
    return out.transpose(1, 2)


def one_token_attention(
    query: Tensor,  # [B, heads, 1, head size]
    key: Tensor,  # [B, key heads, S, head size]
    value: Tensor,
    mask: Tensor,  # bool [B, 1, 1, S]
    scaling: float | None,
) -> Tensor:
    """[B, 1, heads, head size]. Heads that share keys are queries of one head: with a mask, SDPA would
    want the keys and values repeated for each head, a copy of the whole cache in every layer."""
    grouped = query.view(len(query), key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(len(query), 1, query.shape[1], -1)


def ready_mask(device: torch.device) -> Tensor:
    """For a packed forward, which needs none: transformers takes a mask of four dimensions as it is.
    Given none at all it looks for sequence ends in the position ids, and the host waits."""
    return torch.ones(READY_MASK_SHAPE, dtype=torch.bool, device=device)


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Generation brings a 2-D mask and gets SDPA's; a packed forward brings its own mask.

    On CUDA always a whole mask: to leave it out where nothing is padded, the host would have to look
    at it, once a token.
    """
    if attention_mask is None:
        return None
    windows = _WINDOWS.get()
    if attention_mask.is_cuda or windows is not None:
        kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    if windows is not None:
        if kwargs.get("use_vmap"):
            raise UnsupportedAttention(
                "its attention mask has a custom mask function: not supported"
            )
        windows.masks.append((mask, kwargs.get("local_size")))
    return mask


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)
