"""Attention within a pack on the pretend GPU: the values of the CPU, by kernels that hold no scores."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu.machine import pretend_gpu

from exgrpo_fast.model.attention.backends import BACKENDS, BackendName
from exgrpo_fast.model.attention.layout import AttentionLayout, Scoring

LAYOUT = AttentionLayout(
    prompt_lengths=torch.tensor([3, 5]),
    completion_lengths=torch.tensor([4, 2, 6]),
    prompt_of=torch.tensor([0, 0, 1]),
)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("varlen", torch.bfloat16)],
)
def test_shared_key_heads(name: BackendName, dtype: torch.dtype, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 2, 2)  # heads of queries, keys, values
    given = [torch.randn(20, heads, 8, generator=generator).to(dtype) for heads in sizes]
    scoring = Scoring(window=window)
    expected = BACKENDS["sdpa"](LAYOUT, torch.device("cpu"))(*given, scoring=scoring)
    with pretend_gpu() as gpu:
        attention = BACKENDS[name](LAYOUT, torch.device("cuda"))
        with gpu.waits.during() as waits:
            found = attention(*(tensor.to("cuda") for tensor in given), scoring=scoring)
        found = found.cpu()
        assert gpu.whole_scores == []
        assert len(waits) == 3  # the copies of this test
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.float(), expected.float(), atol=tolerance)
