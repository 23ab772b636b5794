"""Generation with packed weights: the same products up to rounding, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Observer, Request, Sampling
from exgrpo_fast.rollout.hf import engine as engine_module
from exgrpo_fast.rollout.hf import packed_weights as packed_weights_module
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.hf.packed_weights import LEAST_TOKENS, packed_weights


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch) -> None:
    monkeypatch.setattr(packed_weights_module, "LEAST_ELEMENTS", 0)


REQUESTS = [Request((5, 6, 7, 8 + i % 3), i) for i in range(12)]


@pytest.fixture
def policy(model_folder, monkeypatch) -> Policy:
    """Of a family that is decoded by the model's own forward pass."""
    monkeypatch.setattr(engine_module, "can_be_decoded", lambda *_: False)
    policy = Policy(load_model(str(model_folder)))
    with torch.no_grad():
        policy.head.weight.mul_(20)
    return policy


def engine_of(policy: Policy) -> TransformersEngine:
    return TransformersEngine(policy, eos_token_ids=[1], pad_token_id=0)


class Looking(Observer):
    """Counts the linear layers that are packed while tokens are drawn."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.counts = model, set[int]()

    def on_poll(self) -> None:
        self.counts.add(sum("forward" in vars(module) for module in self.model.modules()))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_products_are_those_of_the_layer(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(33, 65, bias=bias)
    inputs = torch.randn(rows, 2, 33)
    expected = nn.functional.linear(
        inputs.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    with packed_weights(nn.Sequential(layer), rows=8):
        assert "forward" in vars(layer)
        torch.testing.assert_close(layer(inputs).double(), expected, atol=1e-6, rtol=1e-6)
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_a_later_block_sees_the_weights_of_then() -> None:
    layer, inputs = nn.Linear(4, 4, bias=False), torch.eye(4)
    for scale in (1.0, 3.0):
        layer.weight.copy_(scale * torch.eye(4))
        with packed_weights(layer, rows=1):
            assert torch.equal(layer(inputs), scale * torch.eye(4))


def test_an_error_inside_leaves_plain_layers() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(KeyError), packed_weights(layer, rows=1):
        raise KeyError
    assert "forward" not in vars(layer)


def test_only_plain_float32_layers_are_packed() -> None:
    class Router(nn.Linear):
        pass

    plain, half, router = nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), Router(4, 4)
    with packed_weights(nn.ModuleList([plain, half, router]), rows=1):
        assert ["forward" in vars(layer) for layer in (plain, half, router)] == [True, False, False]
        with packed_weights(plain, rows=1):
            pass
        assert "forward" in vars(plain)  # the outer block's


def test_completions_are_those_of_plain_weights_to_1e_5(policy, monkeypatch) -> None:
    seen = Looking(policy.model)
    sampling = Sampling(LEAST_TOKENS, entropies=True)
    ours = engine_of(policy).generate(REQUESTS, sampling, seen)
    linear = [m for m in policy.model.modules() if type(m) is nn.Linear]
    assert seen.counts == {len(linear)} and len(linear) > 10
    assert not any("forward" in vars(layer) for layer in linear)

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("packed for a short generation")

    plain = Looking(policy.model)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "LEAST_TOKENS", LEAST_TOKENS + 1)
        patch.setattr(engine_module, "packed_weights", never)
        theirs = engine_of(policy).generate(REQUESTS, sampling, plain)
    assert plain.counts == {0}
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.token_ids, other.token_ids)
        torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-5, rtol=0)
        assert mine.entropies is not None
        torch.testing.assert_close(mine.entropies, other.entropies, atol=1e-5, rtol=0)


def test_a_small_weight_stays_as_it_is(monkeypatch) -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 5)])
    monkeypatch.setattr(packed_weights_module, "LEAST_ELEMENTS", 20)
    with packed_weights(layers, rows=1):
        assert ["forward" in vars(layer) for layer in layers] == [False, True]


@pytest.mark.parametrize("is_supported", [True, False])
def test_bfloat16_is_packed_where_the_processor_multiplies_in_it(
    is_supported: bool, policy, model_folder, monkeypatch
) -> None:
    monkeypatch.setattr(engine_module, "has_products_in", lambda dtype: is_supported)
    half = Policy(load_model(str(model_folder)), compute_dtype=torch.bfloat16)
    seen, sampling = Looking(half.model), Sampling(LEAST_TOKENS)
    found = engine_of(half).generate(REQUESTS, sampling, seen)
    linear = [m for m in half.model.modules() if type(m) is nn.Linear]
    assert seen.counts == {len(linear) if is_supported else 0}
    prompts, tokens = (
        Ragged.of([r.prompt_ids for r in REQUESTS]),
        Ragged.of([c.token_ids for c in found]),
    )
    drawn, true = torch.cat([c.logprobs for c in found]), policy.score(prompts, tokens).logprobs
    usual = (half.score(prompts, tokens).logprobs - true).abs().mean()
    assert 0 < (drawn - true).abs().mean() < 2 * usual
