"""Which back ends of attention there are, and which can run here."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from exgrpo_fast.model.attention import flash, flex, sdpa, varlen
from exgrpo_fast.model.attention.layout import AttentionLayout

BackendName = Literal["flash", "varlen", "flex", "sdpa"]
AUTO: list[BackendName] = ["flash", "varlen", "sdpa"]  # in this order, as far as they can run


class PackedAttention(Protocol):
    """The attention within one pack; its indices are made once, for all layers."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[L, heads, head size], keys and values [L, key heads, head size] -> as the queries.

        `scaling`: of the scores, None = 1 / sqrt(head size); `window`: tokens that are seen, the
        own one included, None = all; `sinks`: [heads], a score that takes its share of the softmax
        and has no value (gpt-oss).
        """
        ...


class Backend(Protocol):
    """A layout -> the attention of that pack."""

    def __call__(self, layout: AttentionLayout, device: torch.device) -> PackedAttention: ...


BACKENDS: dict[BackendName, Backend] = {
    "flash": flash.Flash,
    "varlen": varlen.Varlen,
    "flex": flex.Flex,
    "sdpa": sdpa.SideBySide,
}


def choose(
    asked: BackendName | Literal["auto"],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    model: Any = None,
    dropout: bool = False,
    sinks: bool = False,
) -> BackendName:
    """`asked` with `auto` resolved; arguments as for `refusal`."""
    if asked != "auto":
        return asked
    where: dict[str, Any] = {"device": device, "dtype": dtype, "model": model}
    where |= {"dropout": dropout, "sinks": sinks}
    return next(name for name in AUTO if refusal(name, **where) is None)


def refusal(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    model: Any = None,
    dropout: bool = False,
    sinks: bool = False,
) -> str | None:
    """Why a back end cannot run, as the end of a sentence that begins with its name; else None.

    `dtype`: the compute dtype; `model`: the transformers config, where it is known already;
    `dropout`: whether attention weights are dropped; `sinks`: whether the model has attention sinks.
    """
    if name == "sdpa":
        return None
    if dropout and name != "flash":
        return "has no dropout, which model.dropout asks for; take sdpa or auto"
    if sinks and name != "flex":
        return "has no attention sinks, which this model has; take sdpa or auto"
    return _device_refusal(name, torch.device(device), dtype) or _model_refusal(name, model)


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
    if name == "varlen" and varlen.kernel() is None:
        return "needs torch 2.11 or later; take sdpa or auto"
    return None


def _model_refusal(name: str, model: Any) -> str | None:
    if model is None:
        return None
    sizes = head_sizes(model)
    if name != "flex" and (len(sizes) > 1 or max(sizes) > 256 or max(sizes) % 8):
        return f"has no kernel for heads of {sorted(sizes)}; take sdpa or auto"
    return None


def head_sizes(model: Any) -> set[int]:
    """Of queries, keys and values, in all layers."""
    layers = getattr(model, "per_layer_config", None) or [model]
    sizes = set()
    for layer in layers:
        usual = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        sizes |= {getattr(layer, "qk_head_dim", usual), getattr(layer, "v_head_dim", usual)}
    return sizes
