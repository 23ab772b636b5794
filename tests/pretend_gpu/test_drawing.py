"""Tokens drawn on the pretend GPU."""

from __future__ import annotations

import torch
from pretend_gpu.machine import pretend_gpu

from exgrpo_fast.rollout.engine import Sampling
from exgrpo_fast.rollout.hf.drawing import draw, running_sum

LOGITS = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
SEEDS = torch.arange(7) * 10**9


def test_deterministic_algorithms_draw_the_same_tokens() -> None:
    """CUDA's cumsum of floats has no deterministic version."""
    for sampling in (Sampling(4), Sampling(4, top_p=0.9), Sampling(4, top_k=9, top_p=0.9)):
        expected, expected_logprobs, *_ = draw(LOGITS, SEEDS, 3, sampling)
        with pretend_gpu():
            torch.use_deterministic_algorithms(True)
            try:
                tokens, logprobs, *_ = draw(LOGITS.to("cuda"), SEEDS.to("cuda"), 3, sampling)
            finally:
                torch.use_deterministic_algorithms(False)
            assert tokens.tolist() == expected.tolist()
            assert torch.allclose(logprobs.cpu(), expected_logprobs)


def test_running_sum_by_doubling() -> None:
    values = torch.rand(3, 130, generator=torch.Generator().manual_seed(1))
    with pretend_gpu():
        torch.use_deterministic_algorithms(True)
        try:
            found = running_sum(values.to("cuda")).cpu()
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.allclose(found.double(), values.double().cumsum(1), rtol=1e-6)
