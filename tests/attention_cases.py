"""Packs of every shape, and what attention over them must be: each completion alone behind its
prompt, by a dense matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from exgrpo_fast.model.attention.layout import AttentionLayout

# prompt lengths, and for each the lengths of its completions as they are read
SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "one completion": [(5, [7])],
    "nothing shared": [(4, [3]), (1, [6]), (9, [1])],
    "groups": [(6, [5, 3, 3, 1]), (2, [8, 7]), (3, [4])],
    "completions of one token": [(4, [0, 3, 0]), (7, [0])],
    "a long prompt": [(40, [3, 2, 1, 1, 2, 3, 1, 2])],
    "one long among short": [(2, [50, 1, 2, 3, 1]), (3, [2, 2, 2])],
}


def layout_of(shape: list[tuple[int, list[int]]]) -> AttentionLayout:
    of = [g for g, (_, completions) in enumerate(shape) for _ in completions]
    return AttentionLayout(
        torch.tensor([prompt for prompt, _ in shape]),
        torch.tensor([length for _, completions in shape for length in completions]),
        torch.tensor(of),
    )


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sees_QK: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T) v over what each query sees: [Q, heads, d], [K, key heads, d].

    `sinks`: [heads], a score more for each head, without a value.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~sees_QK, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(query), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def bottom_right(length_q: int, length_k: int, left: int) -> Tensor:
    """bool [Q, K]: the last query stands beside the last key; `left` < 0: no window."""
    places_q = torch.arange(length_q)[:, None] + length_k - length_q
    distance = places_q - torch.arange(length_k)
    return (distance >= 0) & ((distance <= left) | (left < 0))


def each_alone(
    shape: list[tuple[int, list[int]]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each prompt alone, and each completion alone behind its prompt."""
    left = -1 if window is None else window - 1
    out, start = [], 0
    for prompt, completions in shape:
        of_prompt = torch.arange(start, start + prompt)
        sees = bottom_right(prompt, prompt, left)
        out.append(dense(query[of_prompt], key[of_prompt], value[of_prompt], scaling, sees, sinks))
        start += prompt
        for length in completions:
            rows = torch.cat([of_prompt, torch.arange(start, start + length)])
            sees = bottom_right(len(rows), len(rows), left)
            out.append(dense(query[rows], key[rows], value[rows], scaling, sees, sinks)[prompt:])
            start += length
    return torch.cat(out)


# --- what the libraries' documentation says of their kernels --------------------------------------


class FlashAttn:
    """flash_attn_varlen_func of flash-attn 2.8, by its docstring."""

    def __init__(self) -> None:
        self.keys: list[int] = []  # of each call

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        assert causal and not dropout_p and not softcap and window_size in [(-1, -1), window_size]
        assert window_size[1] == (-1 if window_size[0] < 0 else 0)
        self.keys.append(len(k))
        return sequences(
            (q, k, v),
            (cu_seqlens_q, cu_seqlens_k),
            (max_seqlen_q, max_seqlen_k),
            softmax_scale,
            window_size[0],
        )


class VarlenAttn(FlashAttn):
    """torch.nn.attention.varlen.varlen_attn of torch 2.13, by its docstring."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert window_size[1] == 0, "not causal"
        assert enable_gqa or query.shape[1] == key.shape[1]
        self.keys.append(len(key))
        lengths = (max_q, max_k)
        return sequences((query, key, value), (cu_seq_q, cu_seq_k), lengths, scale, window_size[0])


def sequences(
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    left: int,
) -> Tensor:
    """Causal attention of sequences with fewer queries than keys, aligned to the bottom right."""
    query, key, value = qkv
    lengths_q, lengths_k = (cu.diff().tolist() for cu in cu_seqlens)
    assert all(cu.dtype == torch.int32 and cu[0] == 0 for cu in cu_seqlens)
    assert (sum(lengths_q), sum(lengths_k)) == (len(query), len(key))
    assert (max(lengths_q), max(lengths_k)) == longest and min(lengths_q) > 0
    parts = zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True)
    return torch.cat(
        [dense(q, k, v, scaling, bottom_right(len(q), len(k), left)) for q, k, v in parts]
    )
