"""The adapter for prime-rl against classes of the shape that its interface documents."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective
from exgrpo_kernels import policy_loss as vector_policy_loss
from exgrpo_kernels.adapters import AdapterError, prime_rl


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


class ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, inv_temperature, chunk_size):  # type: ignore[override]
        raise NotImplementedError


@pytest.fixture(autouse=True)
def fake_package(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    modules = {}
    for name in (prime_rl.LOSS_MODULE, prime_rl.HEAD_MODULE):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            modules.setdefault(path, ModuleType(path))
            monkeypatch.setitem(sys.modules, path, modules[path])
    modules[prime_rl.LOSS_MODULE].LossOutputs = LossOutputs  # type: ignore[attr-defined]
    modules[prime_rl.HEAD_MODULE]._SequenceChunkedLogProbEntropyFn = ChunkedHead  # type: ignore
    return modules


def inputs(**changes) -> LossInputs:
    values = {
        "trainer_logprobs": torch.tensor([-0.1, -1.2, -0.5, -2.3], requires_grad=True),
        "inference_logprobs": torch.tensor([-0.3, -1.0, -0.55, -1.6]),
        "ref_logprobs": torch.tensor([-0.6, -0.9, -0.52, -4.0]),
        "advantages": torch.tensor([1.0, -1.0, 1.0, 1.0]),
        "loss_mask": torch.tensor([True, True, False, True]),
    }
    return LossInputs(**(values | changes))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"surrogate": "cispo", "clip_high": 4.0},
        {"ratio_level": "sequence"},
        {"kl_coef": 0.05},
    ],
)
def test_the_loss_is_the_objective_summed_over_the_mask(settings: dict) -> None:
    made = prime_rl.policy_loss(inputs(), **settings)
    made.loss.backward()
    sample = inputs()
    mask = sample.loss_mask
    assert sample.ref_logprobs is not None
    leaf = sample.trainer_logprobs.detach()[mask].requires_grad_()
    expected = vector_policy_loss(
        leaf,
        advantages=sample.advantages[mask],
        behaviour_logprobs=sample.inference_logprobs[mask],
        weights=torch.ones(3),
        ref_logprobs=sample.ref_logprobs[mask] if settings.get("kl_coef") else None,
        sequence_ids=torch.zeros(3, dtype=torch.long),
        objective=PolicyObjective(**settings),
    )
    assert made.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert "exgrpo/clip_high_frac" in made.metrics or made.metrics


def test_masked_tokens_have_no_gradient_and_weights_scale() -> None:
    sample = inputs(loss_weights=torch.tensor([0.5, 1.0, 1.0, 2.0]))
    prime_rl.policy_loss(sample, surrogate="reinforce").loss.backward()
    assert sample.trainer_logprobs.grad is not None
    assert sample.trainer_logprobs.grad.tolist() == pytest.approx([-0.5, 1.0, 0.0, -2.0])


def test_unknown_settings_and_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match="PolicyObjective has no clip_hi"):
        prime_rl.policy_loss(inputs(), clip_hi=0.2)
    with pytest.raises(AdapterError, match="advantages, loss_mask"):
        prime_rl.policy_loss(SimpleNamespace(trainer_logprobs=0, inference_logprobs=0))


def test_the_head_is_replaced_and_restored(fake_package: dict[str, ModuleType]) -> None:
    module = fake_package[prime_rl.HEAD_MODULE]
    undo = prime_rl.use_fused_head()
    head = module._SequenceChunkedLogProbEntropyFn  # type: ignore[attr-defined]
    hidden = torch.randn(5, 8, requires_grad=True)
    weight, labels = torch.randn(20, 8), torch.arange(5)
    inv_temperature = torch.linspace(0.5, 2.0, 5)
    logprobs, entropy = head.apply(hidden, weight, labels, inv_temperature, 2)
    expected = torch.log_softmax((hidden @ weight.t()).double() * inv_temperature[:, None], -1)
    torch.testing.assert_close(logprobs.double(), expected[range(5), labels], rtol=1e-5, atol=1e-5)
    entropy.sum().backward()  # prime-rl's own head refuses a gradient of the entropy
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    undo()
    assert module._SequenceChunkedLogProbEntropyFn is ChunkedHead  # type: ignore[attr-defined]


def test_a_moved_head_is_an_error(fake_package: dict[str, ModuleType]) -> None:
    del fake_package[prime_rl.HEAD_MODULE]._SequenceChunkedLogProbEntropyFn  # type: ignore
    with pytest.raises(AdapterError, match="was expected to hold"):
        prime_rl.use_fused_head()
