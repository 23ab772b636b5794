"""Linear layers of frozen models in the compute dtype: the same bits, half the bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from model_families import FAMILIES, ROWS, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, Scores
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.training.reference import Reference, copy_weights

PROMPTS, COMPLETIONS = Ragged.of([(5, 6, 7), (8,)]), Ragged.of([(9, 10, 11, 12), (13, 14)])
QUICK = ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe"]


def policy_of(family: str) -> Policy:
    return Policy(tiny(family), compute_dtype=torch.bfloat16)


def scores(policy: Policy) -> Scores:
    return policy.score(PROMPTS, COMPLETIONS)


def equal(one: Scores, other: Scores) -> bool:
    return torch.equal(one.logprobs, other.logprobs) and torch.equal(one.entropies, other.entropies)


def check_family(family: str) -> None:
    try:
        policy = policy_of(family)
        before = scores(policy)
    except (UserError, NotImplementedError, RuntimeError, ValueError):
        assert ROWS[family] != "right"
        pytest.skip("refused without freezing too")
    assert before.logprobs.isfinite().all()
    policy.freeze()
    assert equal(scores(policy), before)


@pytest.mark.parametrize("family", QUICK)
def test_scores_keep_their_bits(family: str) -> None:
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(QUICK)))
def test_scores_of_all_families_keep_their_bits(family: str) -> None:
    check_family(family)


def test_generation_keeps_its_bits() -> None:
    policy = policy_of("llama")
    engine = TransformersEngine(policy, eos_token_ids=[2], pad_token_id=0)
    requests = [Request((5, 6, 7), seed) for seed in range(4)]
    before = engine.generate(requests, Sampling(8))
    policy.freeze()
    for found, expected in zip(engine.generate(requests, Sampling(8)), before, strict=True):
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_layers_alone_are_cast(family: str) -> None:
    policy = policy_of(family)
    policy.freeze()
    layers = [m for m in policy.model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    head = policy.model.get_output_embeddings()
    cast = {id(m.weight) for m in layers if m is not head}
    assert cast and not any(p.requires_grad for p in policy.model.parameters())
    for parameter in policy.model.parameters():
        wanted = torch.bfloat16 if id(parameter) in cast else torch.float32
        assert parameter.dtype == wanted


def test_float32_stays() -> None:
    policy = Policy(tiny("llama"))
    policy.freeze()
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


def test_a_reference_that_follows_rounds_what_it_is_given() -> None:
    policy, initial = policy_of("llama"), policy_of("llama")
    reference = Reference(initial)
    other = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.01)
    before = scores(policy)
    copy_weights(policy, initial)
    assert equal(scores(initial), before)
    state = {"num_steps": 1, "base": dict(other.named_parameters())}  # float32, as older runs saved
    reference.load_state_dict(state)
    assert equal(scores(initial), scores(policy_of("llama")))
