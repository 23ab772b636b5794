"""Truncated sampling: what was kept, its log-probs in engine, trainer and reference, its update."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_questions, small_config
from torch import Tensor

from exgrpo_fast.config import ConfigError, engine_kind
from exgrpo_fast.config.schema import refuse_world_size
from exgrpo_fast.core.types import Completion, KeptTokens
from exgrpo_fast.model.packing import Ragged, kept_sets, padded_ids
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Request, Sampling, request_seed
from exgrpo_fast.rollout.hf.drawing import draw
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.vllm.model import kept_tokens
from exgrpo_fast.rollout.wire import pack_completion, unpack_completion
from exgrpo_fast.training.saved_updates import UpdateLog, read_update

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14)]
REQUESTS = [Request(p, request_seed(0, 1, str(p), i)) for i in range(4) for p in PROMPTS]
SETTINGS = [
    {"top_k": 4},
    {"top_k": 50, "top_p": 0.6},
    {"top_k": 50, "min_p": 0.3},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


def expected_set(logits_V: Tensor, sampling: Sampling) -> set[int]:
    """min-p, then top-k, then top-p, one token after the other."""
    p = (logits_V.double() / sampling.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = [i for i in order if p[i] >= sampling.min_p * p[order[0]]][: sampling.top_k]
    total, found, reached = sum(float(p[i]) for i in kept), set(), 0.0
    for i in kept:
        if reached >= sampling.top_p:
            break
        found.add(i)
        reached += float(p[i]) / total
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_kept_set_is_that_of_the_definition(settings: dict[str, Any]) -> None:
    sampling = Sampling(1, 0.7, **settings)
    logits = 2 * torch.randn(30, 80, generator=torch.Generator().manual_seed(1))
    tokens, logprobs, kept, *_ = draw(logits, torch.arange(30), 0, sampling)
    assert kept is not None
    for row, token, logprob, ids in zip(logits, tokens, logprobs, kept, strict=True):
        expected = sorted(expected_set(row, sampling))
        assert sorted(i for i in ids.tolist() if i >= 0) == expected
        over_set = (row.double() / 0.7)[expected].log_softmax(0)
        assert logprob.item() == pytest.approx(
            float(over_set[expected.index(int(token))]), abs=1e-5
        )


@pytest.fixture
def policy(model_folder) -> Policy:
    return Policy(load_model(str(model_folder)), temperature=0.7)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_trainers_logprobs_over_the_kept_sets_are_the_engines(policy, settings) -> None:
    engine = TransformersEngine(policy, eos_token_ids=[1], pad_token_id=0, max_batch_sequences=7)
    completions = engine.generate(REQUESTS, Sampling(10, 0.7, **settings))
    prompts = Ragged.of([r.prompt_ids for r in REQUESTS])
    responses = Ragged.of([c.token_ids for c in completions])
    kept = kept_sets(completions)
    assert kept is not None and len(kept) == len(responses.values)
    ids = padded_ids(kept)
    assert ids.shape[1] <= settings["top_k"]
    assert bool((ids == responses.values[:, None]).any(1).all())
    over_sets = policy.score(prompts, responses, kept=kept)
    over_all = policy.score(prompts, responses)
    theirs = torch.cat([c.logprobs for c in completions])
    torch.testing.assert_close(over_sets.logprobs, theirs, atol=1e-5, rtol=0)
    assert float((over_all.logprobs - theirs).abs().mean()) > 0.1
    assert bool((over_sets.entropies <= over_all.entropies + 1e-5).all())


def step_of(make_test_trainer, tokenizer, **sections):
    questions = make_questions(tokenizer, ["a", "b", "c", "d"])
    truncated = {"top_k": 20, "top_p": 0.7, "temperature": 0.8}
    rollout = {"prompts_per_step": 4, "group_size": 4} | truncated
    trainer = make_test_trainer(questions, function="even_length", rollout=rollout, **sections)
    return trainer, *trainer.step()


def test_fresh_tokens_of_truncated_sampling_have_ratio_1(make_test_trainer, tokenizer) -> None:
    _, batch, metrics = step_of(make_test_trainer, tokenizer)
    assert all(t.kept is not None for group in batch.groups for t in group.trajectories)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["grad_norm"] > 0
    engine_gap = {name: value for name, value in metrics.items() if name.startswith("mismatch")}
    assert engine_gap and max(abs(v) for v in engine_gap.values()) < 1e-3, engine_gap


def test_the_gradient_is_that_of_the_truncated_policy(make_test_trainer, tokenizer) -> None:
    """Against autograd through the plain model, each token over its own set."""
    trainer, batch, _ = step_of(make_test_trainer, tokenizer, train={"lr": 1e-9})
    policy, learner = trainer.learner.policy, trainer.learner
    update = learner._batch_of(batch.groups, trainer.objective)
    learner._backward(update)
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    loss = torch.zeros(())
    with policy.as_loaded():
        for term in update.terms:
            trajectory, prompt = term.trajectory, list(term.trajectory.question.prompt_ids)
            ids = torch.tensor([prompt + trajectory.token_ids.tolist()])
            rows = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / policy.temperature
            assert trajectory.kept is not None
            sets = trajectory.kept.ids.long().split(trajectory.kept.counts.tolist())
            for place, (row, kept) in enumerate(zip(rows, sets, strict=True)):
                over_set = row[kept].log_softmax(0)[kept == trajectory.token_ids[place]]
                ratio = (over_set - trajectory.behaviour_logprobs[place]).exp()
                loss = loss - term.weight * term.advantage * ratio.sum()
    loss.backward()
    expected = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=2e-4, msg=name)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3


def test_a_reference_is_over_the_same_set(make_test_trainer, tokenizer) -> None:
    """The initial policy is the reference: before the first update every gap is 0."""
    _, _, metrics = step_of(make_test_trainer, tokenizer, algorithm={"kl": {"coef": 0.1}})
    assert metrics["kl_ref"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p needs rollout.top_k"),
        ({"rollout": {"min_p": 0.1}}, "rollout.min_p needs rollout.top_k"),
        ({"rollout": {"top_k": 5}, "replay": {"enabled": True}}, "go with replay.enabled"),
        ({"rollout": {"top_k": 5}, "hindsight": {"enabled": True}}, "go with hindsight.enabled"),
    ],
)
def test_what_does_not_go_with_it_is_named(model_folder, sections, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small_config(model_folder, "right", sections)


def test_several_processes_and_vllm_take_it(model_folder, monkeypatch) -> None:
    config = small_config(model_folder, "right", {"rollout": {"top_k": 5}})
    refuse_world_size(config, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert engine_kind(config, "cuda") == "vllm"


def test_completions_travel_with_their_sets() -> None:
    kept = KeptTokens(torch.tensor([4, 7, 2, 150_000], dtype=torch.int32), torch.tensor([3, 1]))
    sent = Completion(torch.tensor([7, 150_000]), torch.tensor([-0.5, 0.0]), False, kept=kept)
    place, found = unpack_completion(json.loads(json.dumps(pack_completion(3, sent))))
    assert place == 3 and found.kept is not None
    assert torch.equal(found.kept.ids, kept.ids) and torch.equal(found.kept.counts, kept.counts)
    plain = unpack_completion(pack_completion(0, replace(sent, kept=None)))[1]
    assert plain.kept is None


def test_what_vllm_keeps_is_what_is_not_minus_infinity() -> None:
    """Of each position the sampled token, then the highest ones."""
    low = -math.inf
    flat = SimpleNamespace(
        start_indices=[0, 4, 8],
        end_indices=[4, 8, 12],
        token_ids=[5, 9, 5, 3, 8, 8, 0, 1, 6, 2, 4, 9],
        logprobs=[-1.0, -0.5, -1.0, low, 0.0, 0.0, low, low, -1.4, -1.0, -1.1, -1.3],
    )
    kept = kept_tokens(flat)
    assert kept.ids.tolist() == [5, 9, 8, 6, 2, 4, 9]
    assert kept.counts.tolist() == [2, 1, 4]


def test_a_saved_update_has_its_sets(make_test_trainer, tokenizer, tmp_path) -> None:
    trainer, batch, _ = step_of(make_test_trainer, tokenizer, train={"lr": 1e-9})
    UpdateLog(tmp_path).write(1, batch.groups, trainer.objective)
    groups, objective = read_update(tmp_path, 1)
    metrics = trainer.learner.update(groups, objective).kernel_metrics
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    for ours, theirs in zip(groups, batch.groups, strict=True):
        for a, b in zip(ours.trajectories, theirs.trajectories, strict=True):
            assert a.kept is not None and b.kept is not None
            assert torch.equal(a.kept.ids, b.kept.ids)
            assert torch.equal(a.kept.counts, b.kept.counts)
