"""Resampling from a prior with two real vLLM models: every stored number against a recompute."""

from __future__ import annotations

import pytest
import torch

from exgrpo_fast.core.types import Completion
from exgrpo_fast.experience.prior.driver import GuidedCompletion, Resampler
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.experience.prior.vllm_backend import VllmDrafter, VllmPrior
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Observer, Request, Sampling, request_seed
from exgrpo_fast.rollout.vllm.engine import VllmEngine

EOS, TAU = 1, 0.5
LIMIT = 90
REQUESTS = [
    Request(
        tuple(5 + (3 * i + j) % 200 for j in range(1 + 37 * i % 150)),
        request_seed(0, 1, str(i), i),
    )
    for i in range(200)
]


@pytest.fixture
def policies(folders, vllm_models) -> dict[str, Policy]:
    """A policy and a prior a little beside it, both loaded into vLLM; ends are not rare."""
    policy = Policy(load_model(str(folders["untied"])))
    prior = Policy(load_model(str(folders["untied"])))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        policy.head.weight.mul_(3)
        noise = torch.randn(policy.head.weight.shape, generator=generator)
        prior.head.weight.copy_(policy.head.weight + 0.04 * noise)
    vllm_models["untied"].load(policy.named_weights(), 1)
    vllm_models["prior"].load(prior.named_weights(), 1)
    return {"policy": policy, "prior": prior}


def engine_of(policies, vllm_models) -> VllmEngine:
    return VllmEngine(vllm_models["untied"], policies["policy"])


def make_resampler(
    policies, vllm_models, *, block_tokens: int = 8, limit: int = LIMIT
) -> Resampler:
    return Resampler(
        VllmDrafter(engine_of(policies, vllm_models)),
        VllmPrior(vllm_models["prior"]),
        Trigger("ratio", TAU),
        block_tokens=block_tokens,
        max_completion_tokens=limit,
        eos_token_ids=[EOS],
    )


def logprobs_of(
    policy: Policy, completions: list[GuidedCompletion], extra: list[list[int]] | None = None
):
    tokens = extra or [completion.token_ids for completion in completions]
    prompts = Ragged.of([completion.request.prompt_ids for completion in completions])
    return [logprobs for logprobs, _ in policy.score(prompts, Ragged.of(tokens)).split()]


def test_every_stored_number_is_a_clean_recomputes(policies, vllm_models) -> None:
    resampler = make_resampler(policies, vllm_models)
    completions = resampler.start(REQUESTS).finish()
    policy = logprobs_of(policies["policy"], completions)
    prior = logprobs_of(policies["prior"], completions)
    redrawn = 0
    for completion, p, r in zip(completions, policy, prior, strict=True):
        stored = completion.guidance()
        torch.testing.assert_close(stored.prior_logprobs, r, atol=1e-4, rtol=0)
        kept = ~stored.redrawn
        torch.testing.assert_close(stored.draft_logprobs[kept], p[kept], atol=1e-4, rtol=0)
        torch.testing.assert_close(stored.tested[kept], (p - r)[kept], atol=2e-4, rtol=0)
        assert ((stored.tested > TAU) == stored.redrawn).all()
        redrawn += int(stored.redrawn.sum())
        assert completion.ended == (completion.token_ids[-1] == EOS)
        assert EOS not in completion.token_ids[:-1] and len(completion.token_ids) <= LIMIT
    assert redrawn > 100, "hardly anything was rejected: nothing was tested"
    lengths = {len(completion.token_ids) for completion in completions}
    assert len(lengths) > 20 and any(completion.ended for completion in completions)


def test_rejected_tokens_are_above_the_threshold(policies, vllm_models) -> None:
    """For each redrawn position, the draft's own token in its own context."""
    resampler = make_resampler(policies, vllm_models)
    completions = [r for r in resampler.start(REQUESTS[:40]).finish() if any(r.redrawn)]
    cut = [r.redrawn.index(True) for r in completions]
    tried = [[*r.token_ids[:at], r.rejected[at]] for r, at in zip(completions, cut, strict=True)]
    policy = logprobs_of(policies["policy"], completions, tried)
    prior = logprobs_of(policies["prior"], completions, tried)
    assert len(completions) > 20
    for completion, at, p, r in zip(completions, cut, policy, prior, strict=True):
        assert float(p[-1] - r[-1]) == pytest.approx(completion.tested[at], abs=2e-4)
        assert completion.tested[at] > TAU


@pytest.mark.parametrize("block_tokens", [4, 8, 20])
def test_rounds_and_waste_follow_the_trigger_rate(policies, vllm_models, block_tokens) -> None:
    """Drafts of a round: K, or to the first rejection; their mean is E(K, R) = (1-(1-R)^K)/R for
    the measured R. Rounds cut short by an end or by the limit are left out of the count."""
    resampler = make_resampler(policies, vllm_models, block_tokens=block_tokens, limit=330)
    with torch.no_grad():
        policies["policy"].head.weight[EOS] = policies["prior"].head.weight[EOS] = 0.0
    vllm_models["untied"].load(policies["policy"].named_weights(), 2)
    vllm_models["prior"].load(policies["prior"].named_weights(), 2)
    completions = resampler.start(REQUESTS[:60]).finish()
    whole = [r for r in completions if not r.ended]
    tested = sum(len(r.token_ids) for r in whole)
    rate = sum(sum(r.redrawn) for r in whole) / tested
    rounds, emitted = sum(r.rounds for r in whole), tested
    expected = (1 - (1 - rate) ** block_tokens) / rate
    # One last round of each completion is cut by the limit, and one in 128 by the block rule.
    assert emitted / rounds == pytest.approx(expected, rel=0.05)
    assert 0.02 < rate < 0.2


def test_guided_completions_are_made_beside_fresh_ones(policies, vllm_models) -> None:
    resampler = make_resampler(policies, vllm_models)
    engine = engine_of(policies, vllm_models)
    session = resampler.start(REQUESTS[:20])

    class Beside(Observer):
        def __init__(self) -> None:
            self.guided_at: list[int] = []
            self.num_fresh = 0

        def finished(self, places, completions: list[Completion]) -> None:
            self.num_fresh += len(places)

        def on_poll(self) -> None:
            session.advance()
            self.guided_at.append(sum(len(r.token_ids) for r in session.completions))

    observer = Beside()
    fresh = engine.generate(REQUESTS[20:60], Sampling(LIMIT), observer)
    assert observer.guided_at[-1] > 100 and observer.num_fresh == 40
    guided = session.finish()
    alone = make_resampler(policies, vllm_models).start(REQUESTS[:20]).finish()
    assert [r.token_ids for r in guided] == [r.token_ids for r in alone]
    without = engine.generate(REQUESTS[20:60], Sampling(LIMIT))
    assert [c.token_ids.tolist() for c in fresh] == [c.token_ids.tolist() for c in without]


def test_the_prior_keeps_its_cache_and_seldom_asks_twice(policies, vllm_models) -> None:
    resampler = make_resampler(policies, vllm_models)
    completions = resampler.start(REQUESTS).finish()
    assert isinstance(resampler.scorer, VllmPrior)
    assert resampler.scorer.num_retries <= 0.01 * sum(r.rounds for r in completions)
