"""Kernels for sequences of varying length, flash-attn's and torch's own: CUDA, bfloat16 or float16.

A sequence is a completion. Its keys and values are those of its prompt and its own; its queries are
its own, and the first completion of a prompt brings the prompt's along. So the queries of all
sequences, one behind the other, are the pack as it stands, and keys and values alone are gathered.
The last query stands beside the last key: causality is aligned to the bottom right.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.model.attention.blocks import Block, block_by_block, greedy_blocks
from exgrpo_fast.model.attention.layout import AttentionLayout, Scoring

# Keys and values of twice the pack are what the side-by-side back end holds, whose queries and
# outputs are gathered as well: no back end takes more than the memory plan knows of.
GATHERED_KEYS = 2


@dataclass(frozen=True)
class QueryRun(Block):
    """Neighbouring sequences of a pack, for one call of a kernel."""

    cu_seqlens_q: Tensor  # int32 [sequences + 1], where sequences begin and end among the queries
    cu_seqlens_k: Tensor  # int32 [sequences + 1], and among the keys
    max_seqlen_q: int
    max_seqlen_k: int


class RunByRun(ABC):
    """One pack's attention by a kernel that is called for each run."""

    kernel: Callable[..., Tensor]

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        self.runs = query_runs(layout, device)

    def __call__(
        self,
        query: Tensor,  # [L, heads, head size]
        key: Tensor,  # [L, key heads, head size]
        value: Tensor,
        scoring: Scoring,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[L, heads, head size]."""
        assert sinks is None, "this kernel has no attention sinks"
        options = self.options(scoring)

        def attend(run: QueryRun, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
            lengths = (run.cu_seqlens_q, run.cu_seqlens_k, run.max_seqlen_q, run.max_seqlen_k)
            return self.kernel(q, k, v, *lengths, **options)

        return block_by_block(attend, self.runs, query, key, value, scoring)

    @abstractmethod
    def options(self, scoring: Scoring) -> dict[str, Any]:
        """Keyword arguments of the kernel."""


class Flash(RunByRun):
    """The `flash` back end for one pack."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.kernel = flash_kernel()

    def options(self, scoring: Scoring) -> dict[str, Any]:
        return {
            "dropout_p": scoring.dropout,
            "softmax_scale": scoring.scaling,
            "causal": True,
            # tokens to the left of the query's own, which is seen as well
            "window_size": (-1, -1) if scoring.window is None else (scoring.window - 1, 0),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }


def flash_kernel() -> Any:
    """`flash_attn_varlen_func`; since 2.1 its causal mask is aligned to the bottom right."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


class Varlen(RunByRun):
    """The `varlen` back end for one pack, which has no dropout."""

    def __init__(self, layout: AttentionLayout, device: torch.device) -> None:
        found = varlen_kernel()
        assert found is not None, "torch.nn.attention.varlen is missing"
        super().__init__(layout, device)
        self.kernel = found

    def options(self, scoring: Scoring) -> dict[str, Any]:
        assert not scoring.dropout, "varlen_attn has no dropout"
        # (-1, 0) is causal; else tokens to the left of the query's own, which is seen as well
        window = (-1 if scoring.window is None else scoring.window - 1, 0)
        return {"scale": scoring.scaling, "window_size": window}


def varlen_kernel() -> Callable[..., Tensor] | None:
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


def query_runs(layout: AttentionLayout, device: torch.device) -> list[QueryRun]:
    """One run, or several where it would gather more than `GATHERED_KEYS` for each token.

    Several gather half as many each: the pack's own keys and values are kept beside them.
    """
    asking, own, whole = layout.asking, layout.completion_lengths, layout.sequence_lengths
    lengths_q = torch.where(layout.is_first, whole, own)[asking]
    lengths_k = whole[asking]
    most = GATHERED_KEYS * layout.num_tokens
    capacity = most if int(lengths_k.sum()) <= most else most // 2
    runs, start = [], 0
    for members in greedy_blocks(lengths_k.tolist(), capacity=capacity):
        sequences, stop = asking[members].tolist(), start + int(lengths_q[members].sum())
        places = slice(start, stop)
        runs.append(_run(layout, sequences, places, lengths_q[members], lengths_k[members], device))
        start = stop
    return runs


def _run(
    layout: AttentionLayout,
    sequences: Sequence[int],
    places: slice,
    lengths_q: Tensor,
    lengths_k: Tensor,
    device: torch.device,
) -> QueryRun:
    key_rows = torch.cat([layout.sequence_places(s) for s in sequences])
    key_rows, cu_seqlens_q, cu_seqlens_k = to_device(
        [key_rows, _cumulative(lengths_q), _cumulative(lengths_k)], device
    )
    return QueryRun(
        query_rows=places,
        key_rows=key_rows,
        answered=places,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=int(lengths_q.max()),
        max_seqlen_k=int(lengths_k.max()),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
