"""Families that are decoded by packed weights: the log-probs of the model itself, to 1e-5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf import packed_weights
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.hf.packed_decoder import can_be_decoded

SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama, biases": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),
}


def make_policy(name: str) -> Policy:
    """Weights large enough that every part changes the log-probs."""
    torch.manual_seed(0)
    make, config = MODELS[name]
    model = make(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim < 2), std=0.25)
    return Policy(model)


def engine_of(policy: Policy) -> TransformersEngine:
    return TransformersEngine(policy, eos_token_ids=list(range(1, 8)), pad_token_id=0)


def requests_of(lengths: list[int]) -> list[Request]:
    """Three completions of each prompt."""
    prompts = [tuple(range(5, 5 + length)) for length in lengths]
    return [Request(prompt, 10 * i + k) for i, prompt in enumerate(prompts) for k in range(3)]


@pytest.mark.parametrize("least", [0, 10**9], ids=["packed", "plain"])
@pytest.mark.parametrize("lengths", [[7, 7], [4, 11, 1]], ids=["even", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_the_models_own_to_1e_5(
    name: str, lengths: list[int], least: int, monkeypatch
) -> None:
    monkeypatch.setattr(packed_weights, "LEAST_ELEMENTS", least)
    policy, requests = make_policy(name), requests_of(lengths)
    assert can_be_decoded(policy.model)
    passes: list[int] = []
    policy.model.register_forward_pre_hook(lambda *_: passes.append(1))
    completions = engine_of(policy).generate(requests, Sampling(24))
    assert len(passes) == 1  # the prompts
    counts = [len(c.token_ids) for c in completions]
    assert max(counts) > min(counts) + 7  # rows have left on the way
    scores = policy.score(
        Ragged.of([r.prompt_ids for r in requests]), Ragged.of([c.token_ids for c in completions])
    )
    for completion, (logprobs, _) in zip(completions, scores.split(), strict=True):
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("least", [0, 10**9], ids=["packed", "plain"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_the_error_is_that_of_the_model(
    name: str, weights: torch.dtype, least: int, monkeypatch
) -> None:
    monkeypatch.setattr(packed_weights, "LEAST_ELEMENTS", least)
    exact = make_policy(name)
    model: Any = make_policy(name).model
    policy = Policy(model.to(weights), compute_dtype=torch.bfloat16)
    requests = requests_of([4, 11, 1])
    passes: list[int] = []
    policy.model.register_forward_pre_hook(lambda *_: passes.append(1))
    completions = engine_of(policy).generate(requests, Sampling(24))
    assert len(passes) == 1  # the prompts
    tokens = [
        Ragged.of([r.prompt_ids for r in requests]),
        Ragged.of([c.token_ids for c in completions]),
    ]
    drawn = torch.cat([c.logprobs for c in completions])
    true, of_model = exact.score(*tokens).logprobs, policy.score(*tokens).logprobs
    error, usual = (drawn - true).abs().mean(), (of_model - true).abs().mean()
    assert 0.5 * usual < error < 1.5 * usual


def rows_read(policy: Policy) -> list[int]:
    """Filled with the number of rows of every forward pass from now on."""
    found: list[int] = []
    embeddings = policy.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, arguments: found.append(len(arguments[0])))
    return found


def test_rows_that_have_read_the_same_are_read_once() -> None:
    policy, requests = make_policy("llama"), requests_of([4, 11])
    read = rows_read(policy)
    engine_of(policy).generate(requests, Sampling(4, temperature=0.0))
    assert read == [2, 2, 2, 2]


def test_rows_part_at_the_first_token_that_differs() -> None:
    """Eleven completions of one prompt and one of another, by the number of prefixes among them."""
    policy = make_policy("llama")
    with torch.no_grad():
        policy.head.weight.mul_(2.0)
    engine = TransformersEngine(policy, eos_token_ids=[1], pad_token_id=0)
    requests = [Request((5, 6, 7), seed) for seed in range(11)] + [Request((9,), 50)]
    read = rows_read(policy)
    completions = engine.generate(requests, Sampling(6))
    paths = [
        (r.prompt_ids, *c.token_ids.tolist()) for r, c in zip(requests, completions, strict=True)
    ]
    assert all(len(path) == 7 for path in paths)
    assert read == [len({path[: 1 + n] for path in paths}) for n in range(6)]
    assert 2 < read[1] < read[2] < read[-1] < len(requests)  # they part one by one
    scores = policy.score(
        Ragged.of([r.prompt_ids for r in requests]), Ragged.of([c.token_ids for c in completions])
    )
    drawn = torch.cat([c.logprobs for c in completions])
    torch.testing.assert_close(drawn, scores.logprobs, atol=1e-5, rtol=0)


def test_a_completion_is_that_of_the_models_own_loop(monkeypatch) -> None:
    policy, requests = make_policy("qwen3"), requests_of([4, 11])
    ours = engine_of(policy).generate(requests, Sampling(24))
    monkeypatch.setattr("exgrpo_fast.rollout.hf.engine.can_be_decoded", lambda *_: False)
    plain = engine_of(policy).generate(requests, Sampling(24))
    for mine, other in zip(ours, plain, strict=True):
        assert torch.equal(mine.token_ids, other.token_ids)


def test_weights_of_the_next_generation_are_those_of_then() -> None:
    policy, requests = make_policy("llama"), requests_of([4])
    engine_of(policy).generate(requests, Sampling(4))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    completions = engine_of(policy).generate(requests, Sampling(12))
    scores = policy.score(
        Ragged.of([r.prompt_ids for r in requests]), Ragged.of([c.token_ids for c in completions])
    )
    drawn = torch.cat([c.logprobs for c in completions])
    torch.testing.assert_close(drawn, scores.logprobs, atol=1e-5, rtol=0)


def test_others_are_left_to_the_model() -> None:
    def changed(change: Any) -> bool:
        policy = make_policy("qwen3")
        change(policy.model)
        return can_be_decoded(policy.model)

    class Adapted(nn.Linear):
        pass

    assert changed(lambda model: None)
    assert not changed(lambda model: model.bfloat16())
    assert can_be_decoded(make_policy("qwen3").model.bfloat16(), torch.bfloat16)
    assert not changed(lambda model: setattr(model.config, "hidden_act", "gelu"))
    assert not changed(lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"))
    window = ["full_attention", "sliding_attention", "full_attention"]
    assert not changed(lambda model: setattr(model.config, "layer_types", window))
    adapted = Adapted(48, 32, bias=False)
    assert not changed(lambda model: setattr(model.model.layers[1].self_attn, "v_proj", adapted))
    assert not can_be_decoded(MistralForCausalLM(MistralConfig(**SHAPE)))
