"""Which back ends of attention there are, and which can run here."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol, Required, TypedDict, Unpack

import torch
from torch import Tensor

from exgrpo_fast.model.attention import flex, sdpa, varlen
from exgrpo_fast.model.attention.layout import AttentionLayout, Scoring

BackendName = Literal["flash", "varlen", "flex", "sdpa"]
AUTO: list[BackendName] = ["flash", "varlen", "sdpa"]  # in this order, as far as they can run


class PackedAttention(Protocol):
    """The attention within one pack; its indices are made once, for all layers."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[L, heads, head size], keys and values [L, key heads, head size] -> as the queries.

        `sinks`: [heads], a score that takes its share of the softmax and has no value (gpt-oss).
        """
        ...


class Backend(Protocol):
    """A layout -> the attention of that pack."""

    def __call__(self, layout: AttentionLayout, device: torch.device) -> PackedAttention: ...


BACKENDS: dict[BackendName, Backend] = {
    "flash": varlen.Flash,
    "varlen": varlen.Varlen,
    "flex": flex.Flex,
    "sdpa": sdpa.SideBySide,
}


class Facts(TypedDict, total=False):
    """What decides whether a back end can run."""

    device: Required[torch.device | str]
    dtype: Required[torch.dtype]  # the compute dtype
    model: Any  # the transformers config, where it is known already
    dropout: bool  # whether attention weights are dropped
    sinks: bool  # whether the model has attention sinks


def choose(asked: BackendName | Literal["auto"], **facts: Unpack[Facts]) -> BackendName:
    """`asked` with `auto` resolved."""
    if asked != "auto":
        return asked
    return next(name for name in AUTO if refusal(name, **facts) is None)


def refusal(name: str, **facts: Unpack[Facts]) -> str | None:
    """Why a back end cannot run, as the end of a sentence that begins with its name; else None."""
    if name == "sdpa":
        return None
    if facts.get("dropout") and name != "flash":
        return "has no dropout, which model.dropout asks for; take sdpa or auto"
    if facts.get("sinks") and name != "flex":
        return "has no attention sinks, which this model has; take sdpa or auto"
    refused = _device_refusal(name, torch.device(facts["device"]), facts["dtype"])
    model = facts.get("model")
    if refused or model is None or name == "flex":
        return refused
    sizes = head_sizes(model)
    if len(sizes) > 1 or max(sizes) > 256 or max(sizes) % 8:
        return f"has no kernel for heads of {sorted(sizes)}; take sdpa or auto"
    return None


def _device_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}; take sdpa or auto"
    if name == "flex":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs model.dtype bfloat16; take sdpa or auto"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more; take sdpa or auto"
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs flash-attn: pip install 'exgrpo-fast[flash]'; or take auto"
    if name == "varlen" and varlen.varlen_kernel() is None:
        return "needs torch 2.11 or later; take sdpa or auto"
    return None


def head_sizes(model: Any) -> set[int]:
    """Of queries, keys and values, in all layers."""
    layers = getattr(model, "per_layer_config", None) or [model]
    sizes = set()
    for layer in layers:
        usual = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        sizes |= {getattr(layer, "qk_head_dim", usual), getattr(layer, "v_head_dim", usual)}
    return sizes
