"""torch's attention over sequences of varying length, with the checks of its flash kernel.

`torch_attn::_varlen_attn` of torch 2.11 to 2.13 and its backward pass, by plain attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pretend_gpu.tensor import PretendTensor
from torch import Tensor


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """(out [Q, H, D], lse [H, Q], rng state [2]), or the gradients of query, key and value."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    _check(given)
    dtype = given["query"].dtype
    if "grad_out" in given:
        return tuple(PretendTensor(gradient.to(dtype)) for gradient in _gradients(given))
    out = torch.cat([sequence.out for sequence in _sequences(given)])
    lse = torch.zeros(out.shape[1], out.shape[0])  # nothing here reads it
    state = torch.zeros(2, dtype=torch.uint64)
    return tuple(map(PretendTensor, (out.to(dtype), lse, state)))


def _check(given: dict[str, Any]) -> None:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    ends = given["cu_seq_q"], given["cu_seq_k"]
    if not all(isinstance(x, PretendTensor) for x in (query, key, value, *ends)):
        raise RuntimeError("varlen_attn: every tensor has to be on the device")
    if query.dtype not in (torch.float16, torch.bfloat16) or {key.dtype, value.dtype} != {
        query.dtype
    }:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    if any(x.dtype != torch.int32 or not x.values.is_contiguous() for x in ends):
        raise RuntimeError("varlen_attn: cu_seq_q and cu_seq_k must be contiguous int32")
    if any(x.values.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError(f"FlashAttention has no heads of {query.shape[-1]}")
    heads, key_heads = query.shape[1], key.shape[1]
    shares = given.get("enable_gqa", heads != key_heads)
    if heads % key_heads or (heads != key_heads and not shares):
        raise RuntimeError(f"varlen_attn: {heads} heads of queries, {key_heads} of keys")


class _Sequence(NamedTuple):
    """Plain attention of one sequence in float32; key heads repeated for each head of queries."""

    rows: slice  # of the queries
    key_rows: slice
    query: Tensor  # [q, H, D]
    key: Tensor  # [k, H, D]
    value: Tensor  # [k, H, D]
    probabilities: Tensor  # [H, q, k]
    out: Tensor  # [q, H, D]


def _sequences(given: dict[str, Any]) -> Iterator[_Sequence]:
    query, key, value = (given[name].values.float() for name in ("query", "key", "value"))
    query_ends, key_ends = (given[name].values.tolist() for name in ("cu_seq_q", "cu_seq_k"))
    left, right = given.get("window_size") or (-1, -1)
    right = 0 if given.get("is_causal") else right
    share = query.shape[1] // key.shape[1]
    for rows, key_rows in zip(
        map(slice, query_ends, query_ends[1:]), map(slice, key_ends, key_ends[1:]), strict=True
    ):
        q = query[rows]
        k, v = (x[key_rows].repeat_interleave(share, 1) for x in (key, value))
        # the last query sees the last key
        ahead = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
        unseen = torch.zeros_like(ahead, dtype=torch.bool)
        if right >= 0:
            unseen |= ahead > right
        if left >= 0:
            unseen |= ahead < -left
        scores = torch.einsum("qhd,khd->hqk", q, k) * _scale(given)
        probabilities = scores.masked_fill(unseen, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", probabilities, v)
        yield _Sequence(rows, key_rows, q, k, v, probabilities, out)


def _scale(given: dict[str, Any]) -> float:
    return given.get("scale") or 1 / math.sqrt(given["query"].shape[-1])


def _gradients(given: dict[str, Any]) -> list[Tensor]:
    """Closed form: autograd is off below the dispatcher."""
    made = [torch.zeros_like(given[name].values.float()) for name in ("query", "key", "value")]
    for s in _sequences(given):
        dout = given["grad_out"].values[s.rows].float()
        dweight = torch.einsum("qhd,khd->hqk", dout, s.value)
        mean = torch.einsum("qhd,qhd->hq", dout, s.out)[:, :, None]
        dscores = s.probabilities * (dweight - mean) * _scale(given)
        share = s.query.shape[1] // made[1].shape[1]
        made[0][s.rows] += torch.einsum("hqk,khd->qhd", dscores, s.key)
        for total, part in (
            (made[1], torch.einsum("hqk,qhd->khd", dscores, s.query)),
            (made[2], torch.einsum("hqk,qhd->khd", s.probabilities, dout)),
        ):
            total[s.key_rows] += part.unflatten(1, (-1, share)).sum(2)
    return made
