"""torch's own kernel for sequences of varying length: CUDA, bfloat16 or float16, no dropout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from exgrpo_fast.model.attention.layout import AttentionLayout
from exgrpo_fast.model.attention.query_runs import QueryRun, RunByRun


def kernel() -> Callable[..., Tensor] | None:
    """`varlen_attn`, FlashAttention-2 with its causal mask aligned to the bottom right.

    None where this torch has none, or one that takes neither scale nor window.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= takes.keys():
        return None
    # torch 2.11 has grouped-query attention by default; later versions need the argument
    grouped = {"enable_gqa": True} if "enable_gqa" in takes else {}
    return partial(varlen_attn, **grouped)  # pyright: ignore[reportReturnType, reportCallIssue]


class Varlen(RunByRun):
    """The `varlen` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        found = kernel()
        assert found is not None, "torch.nn.attention.varlen is missing"
        super().__init__(layout, device)
        self.kernel = found

    def attend(
        self,
        run: QueryRun,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        dropout: float,
    ) -> Tensor:
        assert not dropout, "varlen_attn has no dropout"
        return self.kernel(
            query,
            key,
            value,
            run.cu_seqlens_q,
            run.cu_seqlens_k,
            run.max_seqlen_q,
            run.max_seqlen_k,
            scale=scaling,
            # (-1, 0) is causal; else tokens to the left of the query's own, which is seen as well
            window_size=(-1 if window is None else window - 1, 0),
        )
