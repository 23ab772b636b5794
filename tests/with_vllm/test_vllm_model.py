"""The real vLLM against the trainer's own log-probs; run on every supported release."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from vllm_cases import train_a_little

from exgrpo_fast.model.lora import add_adapter, trainable
from exgrpo_fast.model.packing import Ragged, kept_sets, padded_ids
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Observer, Request, Sampling, request_seed
from exgrpo_fast.rollout.sync_check import VerifiedEngine, WeightsOutOfSync
from exgrpo_fast.rollout.vllm.engine import VllmEngine
from exgrpo_fast.rollout.vllm.model import MAX_TIES

EOS = 1
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), tuple(5 + 7 * i % 200 for i in range(270))]
REQUESTS = [Request(p, request_seed(0, 1, str(p), i)) for i in range(4) for p in PROMPTS]


@pytest.fixture(params=["untied", "tied"])
def engine(request, folders, vllm_models) -> VllmEngine:
    """In step with a policy as it was saved."""
    policy = Policy(load_model(str(folders[request.param])))
    engine = VllmEngine(vllm_models[request.param], policy)
    engine.sync(0)
    return engine


def largest_gap(engine: VllmEngine, temperature: float) -> float:
    """Largest |log-prob difference| over all sampled tokens."""
    engine.policy.temperature = temperature
    completions = engine.generate(REQUESTS, Sampling(24, temperature))
    scores = engine.policy.score(
        Ragged.of([r.prompt_ids for r in REQUESTS]), Ragged.of([c.token_ids for c in completions])
    ).split()
    gaps = [
        (completion.logprobs - logprobs).abs().max()
        for completion, (logprobs, _) in zip(completions, scores, strict=True)
    ]
    return float(torch.stack(gaps).max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers_before_and_after_three_updates(engine, temperature) -> None:
    assert largest_gap(engine, temperature) < 1e-4
    for version in (1, 2, 3):
        train_a_little(engine.policy)
        assert largest_gap(engine, temperature) > 1e-2, "the update changed nothing to be seen"
        engine.sync(version)
        assert largest_gap(engine, temperature) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 4}, {"top_k": 50, "top_p": 0.6}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}],
)
def test_logprobs_over_the_kept_sets_are_the_trainers(engine, settings) -> None:
    """Both sides over what vLLM says was left to draw from; over the whole vocabulary they are apart."""
    engine.policy.temperature = 0.7
    completions = engine.generate(REQUESTS, Sampling(24, 0.7, **settings))
    prompts = Ragged.of([r.prompt_ids for r in REQUESTS])
    responses = Ragged.of([c.token_ids for c in completions])
    kept = kept_sets(completions)
    assert kept is not None and len(kept) == len(responses.values)
    ids = padded_ids(kept)
    assert bool((ids == responses.values[:, None]).any(1).all())
    assert int(kept.lengths.max()) <= settings["top_k"]
    over_sets = engine.policy.score(prompts, responses, kept=kept).logprobs
    theirs = torch.cat([c.logprobs for c in completions])
    assert float((over_sets - theirs).abs().max()) < 1e-4
    over_all = engine.policy.score(prompts, responses).logprobs
    assert float((over_all - theirs).abs().mean()) > 0.1
    smaller = Ragged(kept.values[kept.starts], torch.ones_like(kept.lengths))
    alone = engine.policy.score(prompts, responses, kept=smaller).logprobs
    assert float((alone - theirs).abs().max()) > 0.1, "the rest of the sets changes nothing"


def test_of_many_equal_logits_sixteen_more_than_top_k_are_known(engine) -> None:
    """vLLM's CPU build keeps all of them, here the whole vocabulary."""
    with torch.no_grad():
        engine.policy.head.weight.zero_()
    engine.sync(1)
    vocabulary = len(engine.policy.head.weight)
    for completion in engine.generate(REQUESTS[:3], Sampling(8, top_k=4)):
        assert completion.kept is not None
        assert set(completion.kept.counts.tolist()) <= {4 + MAX_TIES, 5 + MAX_TIES}
        torch.testing.assert_close(
            completion.logprobs, torch.full_like(completion.logprobs, -math.log(vocabulary))
        )


def test_an_adapter_arrives_merged(folders, vllm_models) -> None:
    model = load_model(str(folders["tied"]))
    add_adapter(model, rank=4, alpha=8.0)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_(std=0.1)
    engine = VllmEngine(vllm_models["tied"], Policy(model))
    assert largest_gap(engine, 1.0) > 1e-2
    engine.sync(1)
    assert largest_gap(engine, 1.0) < 1e-4


def test_without_the_reset_of_the_cache_the_old_prompt_is_read(engine, monkeypatch) -> None:
    largest_gap(engine, 1.0)  # the long prompt is in the cache now
    train_a_little(engine.policy)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "drop_cache", lambda: None)
        engine.sync(1)
        assert largest_gap(engine, 1.0) > 1e-3


def verified(engine: VllmEngine) -> VerifiedEngine:
    return VerifiedEngine(
        engine, engine.policy, prompt_ids=[5, 6, 7], max_model_len=512, tolerance=1e-4
    )


def test_the_sync_check_passes_what_is_in_step(engine) -> None:
    watched = verified(engine)
    for version in (1, 2):
        train_a_little(engine.policy)
        assert watched.sync(version)["sync_gap"] < 1e-5


def test_the_sync_check_finds_a_stale_cache(engine, monkeypatch) -> None:
    watched = verified(engine)
    watched.sync(1)
    train_a_little(engine.policy)
    monkeypatch.setattr(engine.model, "drop_cache", lambda: None)
    with pytest.raises(
        WeightsOutOfSync, match=r"after step 2: .* log-prob is -\d+\.\d+, .* -\d+\.\d+;"
    ):
        watched.sync(2)


def test_the_sync_check_finds_an_update_that_was_lost(engine, monkeypatch) -> None:
    watched = verified(engine)
    train_a_little(engine.policy)
    monkeypatch.setattr(engine.model, "load", lambda weights, version: None)
    with pytest.raises(WeightsOutOfSync):
        watched.sync(1)


def test_the_sync_check_finds_one_tensor_that_was_left_out(engine, monkeypatch) -> None:
    watched = verified(engine)
    named = list(engine.policy.named_weights())
    train_a_little(engine.policy)
    without = [(n, w) for n, w in named if n != "model.layers.1.mlp.down_proj.weight"]
    monkeypatch.setattr(engine.policy, "named_weights", lambda: iter(without))
    with pytest.raises(WeightsOutOfSync):
        watched.sync(1)


def test_a_completion_depends_on_its_own_seed_only(engine) -> None:
    together = engine.generate(REQUESTS, Sampling(16))
    alone = [engine.generate([request], Sampling(16))[0] for request in REQUESTS]
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in together}) == len(REQUESTS)


def test_limits_and_ends(engine) -> None:
    with torch.no_grad():  # every token becomes the end with probability near 1/2
        weight = engine.policy.head.weight
        weight.zero_()
    engine.sync(1)
    requests = [Request((5, 6), seed, 1 + seed % 3) for seed in range(12)]
    for request, completion in zip(requests, engine.generate(requests, Sampling(16)), strict=True):
        ids = completion.token_ids.tolist()
        assert EOS not in ids[:-1]
        assert completion.truncated == (ids[-1] != EOS)
        assert len(ids) == request.max_completion_tokens or not completion.truncated
        assert completion.logprobs.shape == completion.token_ids.shape
    greedy = engine.generate([Request((5, 6), 0)], Sampling(8, temperature=0.0))[0]
    again = engine.generate([Request((5, 6), 99)], Sampling(8, temperature=0.0))[0]
    assert greedy.token_ids.tolist() == again.token_ids.tolist()


def test_a_request_that_is_too_long_is_refused_and_harms_no_other(engine) -> None:
    with pytest.raises(ValueError, match="do not fit into 512"):
        engine.generate([Request((5,), 1), Request((5,) * 500, 2)], Sampling(16))
    assert largest_gap(engine, 1.0) < 1e-4


def test_an_observer_that_fails_leaves_a_working_engine(engine) -> None:
    class Failing(Observer):
        def on_poll(self) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.generate(REQUESTS, Sampling(16), Failing())
    assert not engine.model.running
    assert largest_gap(engine, 1.0) < 1e-4


def test_the_random_state_of_the_process_is_untouched(engine) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), float(torch.rand(())))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    engine.sync(1)
    engine.generate(REQUESTS, Sampling(8))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_scores_behind_a_prefix_are_the_trainers_whatever_is_cached(engine) -> None:
    """Prefixes grow as the driver of resampling lets them, over the ends of cached blocks."""
    ids = [5 + 3 * i % 200 for i in range(400)]
    expected = engine.policy.score(Ragged.of([ids[:1]]), Ragged.of([ids[1:]])).logprobs
    asked_twice = 0
    for first in [1, 7, 120, 127, 128, 129, 250, 256, 257, 380]:
        for read_cache in (True, False):
            key = engine.model.add_scoring(ids[: first + 20], first, read_cache=read_cache)
            while engine.model.running:
                engine.model.step()
            found = engine.model.take([key])[key]
            if found is None:
                assert read_cache
                asked_twice += 1
                continue
            wanted = expected[first - 1 : first + 19]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert asked_twice < 5


def test_tokens_say_which_weights_drew_them(engine) -> None:
    if not engine.model.reports_versions:
        with pytest.raises(RuntimeError, match="does not report the weight version"):
            engine.model.add(REQUESTS[0], Sampling(16))
            engine.sync(1)
        engine.model.drop_requests()
        return
    engine.sync(4)
    old = [w.clone() for w in engine.policy.model.parameters()]
    candidates = [Request((5, 6, 7), seed) for seed in range(40)]
    drawn = engine.generate(candidates, Sampling(40))
    # One that does not end before the update arrives: the draws differ between releases.
    request = next(r for r, c in zip(candidates, drawn, strict=True) if len(c.token_ids) == 40)
    key = engine.model.add(request, Sampling(40))
    for _ in range(10):
        engine.model.step()
    assert engine.model.take([key]) == {}
    train_a_little(engine.policy)
    engine.sync(5)
    while engine.model.running:
        engine.model.step()
    completion = engine.model.take([key])[key]
    assert engine.model.take([key]) == {}, "taken once"
    first, second = completion.weight_spans
    assert (first.version, first.start, second.version) == (4, 0, 5)
    assert first.end == second.start and second.end == len(completion.token_ids)

    def scores() -> torch.Tensor:
        return engine.policy.score(Ragged.of([(5, 6, 7)]), Ragged.of([completion.token_ids]))[0]

    new = scores()
    with torch.no_grad():
        for parameter, value in zip(engine.policy.model.parameters(), old, strict=True):
            parameter.copy_(value)
    expected = torch.cat([scores()[: first.end], new[first.end :]])
    torch.testing.assert_close(completion.logprobs, expected, atol=1e-4, rtol=0)
