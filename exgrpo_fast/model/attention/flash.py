"""flash-attn's kernel for sequences of varying length: CUDA, bfloat16 or float16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.model.attention.layout import AttentionLayout
from exgrpo_fast.model.attention.query_runs import QueryRun, RunByRun


def kernel() -> Any:
    """`flash_attn_varlen_func`; since 2.1 its causal mask is aligned to the bottom right."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


class Flash(RunByRun):
    """The `flash` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.kernel = kernel()

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
        return self.kernel(
            query,
            key,
            value,
            run.cu_seqlens_q,
            run.cu_seqlens_k,
            run.max_seqlen_q,
            run.max_seqlen_k,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            # tokens to the left of the query's own, which is seen as well
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
