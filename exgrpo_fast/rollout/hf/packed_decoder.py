"""Decode steps of Llama, Qwen2 and Qwen3 on a CPU, in few and large operations.

With a few dozen rows, what transformers' forward pass spends beside its matrix products is mostly overhead
of single operations. Here projections of the same input are one product, activations and residual additions
are fused into the product before them, and the heads of queries and keys are rotated together. Sequences
with the same tokens so far are computed once. The model itself computes the prompts.

Legend: B sequences, D width, H heads, K key heads, h head size, S tokens in the cache, U prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exgrpo_fast.rollout.hf import packed_weights

FAMILIES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
# The angles of the others depend on the longest sequence so far.
ROTATIONS = {"default", "linear", "llama3", "yarn"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def can_be_decoded(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the model is of one of these families, without sliding windows, and all of its linear
    layers are plain: of float32 or `dtype` on the CPU, no adapter, not quantised."""
    is_ours = not type(model).__module__.startswith("transformers.models.")
    if is_ours or type(model).__name__ not in FAMILIES:
        return False
    linears = [getattr(x.self_attn, name) for x in model.model.layers for name in PROJECTIONS]
    linears += [getattr(x.mlp, name) for x in model.model.layers for name in MLP]
    return (
        model.config.hidden_act == "silu"
        and set(getattr(model.config, "layer_types", None) or ()) <= {"full_attention"}
        and model.model.rotary_emb.rope_type in ROTATIONS
        and all(packed_weights.can_be_packed(x, dtype) for x in [*linears, model.lm_head])
    )


class PackedDecoder:
    """Packed copies of a model's weights, valid until one changes."""

    def __init__(self, model: Any, *, rows: int, dtype: torch.dtype = torch.float32) -> None:
        """`rows`: of most products, a hint. `dtype`: of products, attention and its cache; the sums of the
        residual stream keep the dtype of the embeddings, as under autocast."""
        self.model, self.dtype = model, dtype
        self.layers = [_Layer(layer, rows, dtype) for layer in model.model.layers]
        self.head = _Linear([model.lm_head], rows, dtype)


class Branches:
    """The key-value cache of different sequences. A branch is shared by all rows with the same tokens so
    far: at first there is one for each prompt."""

    def __init__(
        self,
        decoder: PackedDecoder,
        cache: Any,
        mask_UP: Tensor,
        *,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        """`cache`: of the prompts; `num_rows`: branches at most; `num_tokens`: that each may add."""
        self.decoder = decoder
        self.num_rows, self.num_read = num_rows, mask_UP.shape[1]
        self.longest = self.num_read + num_tokens
        prompts = [torch.cat([layer.keys, layer.values], dim=1) for layer in cache.layers]
        self.caches = [self._with_room(held) for held in prompts]
        self.positions_B = mask_UP.sum(dim=1)
        self.mask_B11S = None
        if not mask_UP.all():
            seen_US = F.pad(mask_UP, (0, num_tokens), value=1)
            mask_US = torch.zeros(seen_US.shape, dtype=decoder.dtype)
            mask_US.masked_fill_(seen_US == 0, -torch.inf)
            self.mask_B11S = mask_US[:, None, None]
        self.rotation = _Rotation.of(decoder.model.model.rotary_emb, self.longest)

    def __len__(self) -> int:
        return len(self.positions_B)

    def __call__(self, ids_B: Tensor) -> Tensor:
        """int64 [B], the next token of each branch -> logits [B, V]."""
        model = self.decoder.model.model
        hidden_BD = model.embed_tokens(ids_B)
        rotation = self.rotation.at(self.positions_B)
        start, self.num_read = self.num_read, self.num_read + 1
        mask = None if self.mask_B11S is None else self.mask_B11S[..., : self.num_read]
        for layer, cache in zip(self.decoder.layers, self.caches, strict=True):
            hidden_BD = layer(hidden_BD, rotation, cache[: len(self)], start, mask)
        self.positions_B = self.positions_B + 1
        return self.decoder.head(model.norm(hidden_BD).to(self.decoder.dtype))

    def copy(self, parents_A: Tensor) -> None:
        """Append a copy of each of these branches."""
        stop = len(self) + len(parents_A)
        for cache in self.caches:
            read = cache[:, :, : self.num_read]
            read[len(self) : stop] = read.index_select(0, parents_A)
        self._take(torch.cat([torch.arange(len(self)), parents_A]))

    def select(self, branches_B: Tensor, *, num_rows: int) -> None:
        """Keep these branches alone; `num_rows`: as in the constructor."""
        self.num_rows = num_rows
        for i, cache in enumerate(self.caches):
            self.caches[i] = self._with_room(
                cache[:, :, : self.num_read].index_select(0, branches_B)
            )
        self._take(branches_B)

    def _take(self, index_B: Tensor) -> None:
        self.positions_B = self.positions_B.index_select(0, index_B)
        if self.mask_B11S is not None:
            self.mask_B11S = self.mask_B11S.index_select(0, index_B)

    def _with_room(self, held: Tensor) -> Tensor:
        """[B, 2 K, S, h] -> [num_rows, 2 K, longest, h]: keys of all heads, then values."""
        shape = (self.num_rows, held.shape[1], self.longest, held.shape[3])
        room = torch.empty(shape, dtype=self.decoder.dtype)
        room[: len(held), :, : held.shape[2]] = held
        return room


class _Rotation(NamedTuple):
    """Cosines and sines of positions [S, 1, h], the sines of the first half negated."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(rotary: Any, length: int) -> _Rotation:
        positions = torch.arange(length)[None]
        cos, sin = (x[0, :, None] for x in rotary(torch.empty(0), positions))
        half = sin.shape[-1] // 2
        return _Rotation(cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1))

    def at(self, positions_B: Tensor) -> _Rotation:
        return _Rotation(*(x.index_select(0, positions_B) for x in self))

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, heads, h]. The half that `rotate_half` of transformers negates is that of `sin`."""
        heads = heads.to(self.cos.dtype)
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return (heads * self.cos).addcmul_(swapped, self.sin)


class _Layer:
    def __init__(self, layer: Any, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        attention, mlp = layer.self_attn, layer.mlp
        self.head_size, self.scaling = attention.head_dim, attention.scaling
        self.num_keys = attention.k_proj.out_features // self.head_size
        self.num_heads = attention.q_proj.out_features // self.head_size
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.head_weights, self.head_epsilon = None, 0.0
        if hasattr(attention, "q_norm"):
            of_queries = attention.q_norm.weight.detach().expand(self.num_heads, -1)
            of_keys = attention.k_norm.weight.detach().expand(self.num_keys, -1)
            self.head_weights = torch.cat([of_queries, of_keys])
            self.head_epsilon = attention.q_norm.variance_epsilon
        self.qkv = _Linear([attention.q_proj, attention.k_proj, attention.v_proj], rows, dtype)
        self.out = _Linear([attention.o_proj], rows, dtype)
        self.gate, self.up, self.down = (_Linear([getattr(mlp, name)], rows, dtype) for name in MLP)

    def __call__(
        self,
        hidden_BD: Tensor,
        rotation: _Rotation,
        cache: Tensor,
        start: int,
        mask: Tensor | None,
    ) -> Tensor:
        """[B, D]. `cache` [B, 2 K, longest, h] gets the token's keys and values at `start`."""
        before_attention, before_mlp = self.norms
        rows_BD = normed(hidden_BD, before_attention).to(self.dtype)
        heads = self.qkv(rows_BD).view(len(hidden_BD), -1, self.head_size)
        rotated = rotation(self._normed_heads(heads[:, : self.num_heads + self.num_keys]))
        cache[:, : self.num_keys, start] = rotated[:, self.num_heads :]
        cache[:, self.num_keys :, start] = heads[:, -self.num_keys :]
        found = F.scaled_dot_product_attention(
            rotated[:, : self.num_heads].unflatten(1, (self.num_keys, -1)).to(self.dtype),
            cache[:, : self.num_keys, : start + 1],
            cache[:, self.num_keys :, : start + 1],
            attn_mask=mask,
            scale=self.scaling,
        )
        hidden_BD = self.out.plus(found.reshape(len(hidden_BD), -1), hidden_BD)
        rows_BD = normed(hidden_BD, before_mlp).to(self.dtype)
        gated = self.up.times(rows_BD, self.gate.silu(rows_BD))
        return self.down.plus(gated, hidden_BD)

    def _normed_heads(self, heads: Tensor) -> Tensor:
        if self.head_weights is None:
            return heads
        rows = F.rms_norm(heads.float(), heads.shape[-1:], None, self.head_epsilon)
        return rows * self.head_weights


def normed(rows: Tensor, norm: Any) -> Tensor:
    """RMSNorm of the last dimension."""
    return F.rms_norm(rows, rows.shape[-1:], norm.weight, norm.variance_epsilon)


class _Linear:
    """Linear layers that read the same rows, as one; large weights in oneDNN's layout."""

    def __init__(self, layers: Sequence[nn.Linear], rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.is_packed = weight.numel() >= packed_weights.LEAST_ELEMENTS
        self.weight = packed_weights.pack(weight, rows) if self.is_packed else weight
        self.bias = None
        if any(layer.bias is not None for layer in layers):
            biases = [
                torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                for layer in layers
            ]
            self.bias = torch.cat(biases).to(dtype)

    def __call__(self, rows_BD: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(rows_BD, self.weight, self.bias)
        return packed_weights.linear(self.weight, self.bias, rows_BD)

    def silu(self, rows_BD: Tensor) -> Tensor:
        """Of the product, inside it."""
        if not self.is_packed:
            return F.silu(self(rows_BD), inplace=True)
        product = torch.ops.mkldnn._linear_pointwise
        return product(rows_BD, self.weight, self.bias, "swish", [], "")

    def plus(self, rows_BD: Tensor, other: Tensor) -> Tensor:
        """The product + `other`, added inside it where it has the same dtype."""
        if other.dtype != self.dtype:
            return other + self(rows_BD)
        return self._binary(rows_BD, other, "add") if self.is_packed else self(rows_BD).add_(other)

    def times(self, rows_BD: Tensor, other: Tensor) -> Tensor:
        """The product * `other`, multiplied inside it."""
        return self._binary(rows_BD, other, "mul") if self.is_packed else self(rows_BD).mul_(other)

    def _binary(self, rows_BD: Tensor, other: Tensor, kind: str) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise.binary
        return product(rows_BD, other, self.weight, self.bias, kind)
