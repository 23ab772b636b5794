"""Packed forward against the plain model, one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from exgrpo_fast.model.packing import Ragged, pack
from exgrpo_fast.model.policy import Policy, PolicyError, load_model
from exgrpo_kernels import PolicyObjective, linear_policy_loss

PROMPTS = [(5, 6, 7, 8, 9), (11,), (5, 6), tuple(range(20, 60))]
COMPLETIONS = [torch.tensor(r) for r in ([10, 11, 12], [13], [14, 15, 16, 17, 18, 19, 2], [21, 22])]


def plain_scores(model, prompt, completion):
    """Log-probs and entropies from the full logits of the untouched model."""
    ids = torch.tensor([[*prompt, *completion.tolist()]])
    with torch.no_grad():
        log_p = model.eval()(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return log_p.gather(1, completion[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def sliding_window_model():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=20.0,
    )
    return Gemma3ForCausalLM(config)


def grouped_query_model():
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("max_tokens", [16, 10_000])
@pytest.mark.parametrize("make", [sliding_window_model, grouped_query_model])
def test_scores_equal_the_plain_model(make, max_tokens: int) -> None:
    model = make()
    expected = [plain_scores(model, p, r) for p, r in zip(PROMPTS, COMPLETIONS, strict=True)]
    policy = Policy(model, max_tokens_per_microbatch=max_tokens)
    scores = policy.score(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS))
    for (ours, our_entropies), (logprobs, entropies) in zip(scores.split(), expected, strict=True):
        torch.testing.assert_close(ours.double(), logprobs, atol=2e-5, rtol=0)
        torch.testing.assert_close(our_entropies.double(), entropies, atol=2e-5, rtol=0)
    means = scores.per_completion(scores.entropies)
    assert means.tolist() == pytest.approx([float(e.mean()) for _, e in expected], abs=2e-5)


@pytest.mark.parametrize(
    "family, scale",
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),  # a divisor
        ("hyperclovax", {"logits_scaling": 0.3}),  # a factor
    ],
)
def test_scaled_logits_are_in_scores_and_gradients(family: str, scale: dict[str, float]) -> None:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 80}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings: dict[str, Any] = {**sizes, **heads, **scale, "pad_token_id": 0}
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    expected = [plain_scores(model, p, r) for p, r in zip(PROMPTS, COMPLETIONS, strict=True)]
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([[*prompt, *completion.tolist()]])
        log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_p.gather(1, completion[:, None]).sum().backward()
    slopes = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    policy = Policy(model)
    scores = policy.score(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS)).split()
    for (ours, our_entropies), (logprobs, entropies) in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours.double(), logprobs, atol=2e-5, rtol=0)
        torch.testing.assert_close(our_entropies.double(), entropies, atol=2e-5, rtol=0)
    (packed,) = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=10_000)
    hidden = policy.hidden_states(packed)
    ones = torch.ones(len(packed.targets))
    result = linear_policy_loss(
        hidden,
        policy.head.weight,
        packed.targets,
        advantages=ones,
        behaviour_logprobs=torch.cat([scores[i][0] for i in packed.index]),  # a ratio of 1
        weights=ones,
        objective=PolicyObjective(clip_low=None, clip_high=None),
    )
    result.loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(-weight.grad, slopes[name], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_plain_model(model_folder, checkpointing: bool) -> None:
    """The whole path: packing, attention, fused loss, accumulation over packs."""
    advantages, old = [0.5, -1.0, 2.0, -0.25], -4.0
    plain = load_model(str(model_folder))
    loss = torch.zeros(())
    for prompt, completion, advantage in zip(PROMPTS, COMPLETIONS, advantages, strict=True):
        ids = torch.tensor([[*prompt, *completion.tolist()]])
        log_p = plain(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ratio = (log_p.gather(1, completion[:, None])[:, 0] - old).exp()
        loss = loss - (advantage * ratio).sum() / 13
    loss.backward()

    policy = Policy(load_model(str(model_folder)), gradient_checkpointing=checkpointing)
    total = 0.0
    for packed in pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=45):
        hidden = policy.hidden_states(packed)
        spread = torch.tensor([advantages[i] for i in packed.index])
        result = linear_policy_loss(
            hidden,
            policy.head.weight,
            packed.targets,
            advantages=spread.repeat_interleave(torch.tensor(packed.lengths)),
            behaviour_logprobs=torch.full((len(packed.targets),), old),
            weights=torch.full((len(packed.targets),), 1 / 13),
            objective=PolicyObjective(clip_low=None, clip_high=None),
        )
        result.loss.backward()
        total += float(result.loss.detach())
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, ours), theirs in zip(
        policy.model.named_parameters(), plain.parameters(), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_packs_hold_their_budget_and_every_sequence_once() -> None:
    packs = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=12)
    assert sorted(i for p in packs for i in p.index) == [0, 1, 2, 3]
    assert [len(p.input_ids) for p in packs] == [41, 8, 8]  # the first is too long for any pack
    for p in packs:
        assert p.targets.tolist() == [t for i in p.index for t in COMPLETIONS[i].tolist()]
        for place, row in zip(p.rows.tolist(), p.targets.tolist(), strict=True):
            follower = place + 1  # what comes next in the pack, unless the sequence ends there
            if follower not in p.layout.prompt_starts.tolist() + [len(p.input_ids)]:
                assert p.input_ids[follower] == row


def test_models_that_would_be_wrong_are_refused(tmp_path, model_folder) -> None:
    model = load_model(str(model_folder))
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(PolicyError, match="soft-capped attention"):
        Policy(model)
    with pytest.raises(PolicyError, match="no config.json"):
        load_model(str(tmp_path))
