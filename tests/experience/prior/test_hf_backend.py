"""The holed cache against clean forward passes of the same models."""

from __future__ import annotations

import pytest
import torch

from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.experience.prior.driver import GuidedCompletion, Resampler
from exgrpo_fast.experience.prior.hf_backend import TransformersDrafter, TransformersPrior
from exgrpo_fast.experience.prior.mixture import mixture_logprobs
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, PolicyError
from exgrpo_fast.rollout.engine import Request

ROWS, TOKENS = 288, 270  # of the head, and ids of the prior; the rest is padding
EOS = [3, *range(40, 50)]


def make_pair() -> tuple[Policy, Policy]:
    """Sharp policies that mostly agree; the prior's head has fewer rows."""
    tokenizer = make_tokenizer(["1 + 2"] * 3, vocab_size=ROWS)
    models = [make_model(tokenizer, seed=0, layers=2, width=64) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    weight = 25 * torch.randn(ROWS, 64, generator=generator) / 64**0.5
    for model, rows, noise in zip(models, (ROWS, TOKENS + 4), (0.0, 0.1), strict=True):
        model.resize_token_embeddings(rows)
        changed = weight[:rows] + noise * torch.randn(rows, 64, generator=generator)
        changed[EOS] += 4 * noise * torch.randn(len(EOS), 64, generator=generator)
        model.lm_head.weight.data.copy_(changed / 4)
    models[1].model.load_state_dict(
        {
            name: value[: TOKENS + 4] if name.startswith("embed") else value
            for name, value in models[0].model.state_dict().items()
        }
    )
    policy, prior = (Policy(model) for model in models)
    return policy, prior


@pytest.fixture(scope="module")
def pair() -> tuple[Policy, Policy]:
    torch.set_num_threads(1)
    return make_pair()


def resampler(pair, trigger: Trigger, *, block_tokens: int = 8, limit: int = 40) -> Resampler:
    policy, prior = pair
    return Resampler(
        TransformersDrafter(policy, vocabulary_size=ROWS, eos_token_ids=EOS),
        TransformersPrior(prior, num_tokens=TOKENS, vocabulary_size=ROWS),
        trigger,
        block_tokens=block_tokens,
        max_completion_tokens=limit,
        eos_token_ids=EOS,
    )


def requests(count: int) -> list[Request]:
    return [Request(tuple(range(50 + i, 52 + i + i % 9)), 7000 + i) for i in range(count)]


def clean(policy: Policy, completion: GuidedCompletion, num_tokens: int) -> torch.Tensor:
    """float64 [T, ROWS]: one completion alone, no cache, no padding."""
    ids = torch.tensor([[*completion.request.prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        ids = ids.clamp(max=policy.head.weight.shape[0] - 1)
        logits = policy.model(ids, use_cache=False).logits[0].double()
    start = len(completion.request.prompt_ids) - 1
    known = logits[start:-1, :num_tokens].log_softmax(-1)
    return torch.nn.functional.pad(known, (0, ROWS - num_tokens), value=-torch.inf)


def test_every_stored_number_is_that_of_a_clean_pass(pair) -> None:
    """Hundreds of ragged completions; ends in kept drafts, in rejected ones, from the prior, and at
    the limit all occur."""
    trigger = Trigger("ratio", 0.5)
    completions = resampler(pair, trigger).start(requests(300)).finish()
    policy, prior = pair
    worst, ends = 0.0, dict.fromkeys(("drafted", "rejected", "prior", "limit"), 0)
    for completion in completions:
        logp, logr = clean(policy, completion, ROWS), clean(prior, completion, TOKENS)
        guidance = completion.guidance()
        tokens = torch.tensor(completion.token_ids)[:, None]
        kept = ~guidance.redrawn
        rejected = torch.where(kept, tokens[:, 0], guidance.rejected)[:, None]
        gaps = [
            guidance.draft_logprobs[kept] - logp.gather(1, tokens)[kept, 0],
            guidance.prior_logprobs - logr.gather(1, tokens)[:, 0],
        ]
        tested = (logp - logr).gather(1, rejected)[:, 0]
        finite = tested.isfinite()
        gaps.append((guidance.tested - tested)[finite])
        assert torch.equal(guidance.tested.isfinite(), finite)
        worst = max(worst, *(float(gap.abs().max()) for gap in gaps if len(gap)))
        assert torch.equal(guidance.redrawn, guidance.tested > 0.5)
        last = completion.token_ids[-1] in EOS
        assert completion.ended == last and len(completion.token_ids) <= 40
        assert not set(completion.token_ids[:-1]) & set(EOS)
        ends["limit"] += not last
        ends["prior" if completion.redrawn[-1] else "drafted"] += last
        ends["rejected"] += any(token in EOS for token in completion.rejected)
    assert worst < 1e-4
    assert min(ends.values()) >= 5, ends
    assert len({len(completion.token_ids) for completion in completions}) > 20
    redrawn = [flag for completion in completions for flag in completion.redrawn]
    assert 0.02 < sum(redrawn) / len(redrawn) < 0.5


def test_a_completion_depends_on_its_seed_alone(pair) -> None:
    trigger, asked = Trigger("ratio", 0.5), requests(40)
    together = resampler(pair, trigger).start(asked).finish()
    for place in (0, 7, 31):
        (alone,) = resampler(pair, trigger).start([asked[place]]).finish()
        assert alone.token_ids == together[place].token_ids
        assert alone.redrawn == together[place].redrawn


@pytest.mark.parametrize(("rule", "threshold"), [("entropy", 1.0), ("tv", 0.3), ("js", 0.1)])
def test_rules_of_states_test_the_clean_distributions(pair, rule, threshold: float) -> None:
    trigger = Trigger(rule, threshold)
    completions = resampler(pair, trigger, limit=20).start(requests(30)).finish()
    flags = []
    for completion in completions:
        logp, logr = clean(pair[0], completion, ROWS), clean(pair[1], completion, TOKENS)
        statistic = trigger.statistic(logp, logr)[:, 0]
        guidance = completion.guidance()
        assert torch.allclose(guidance.tested.double(), statistic, atol=1e-4)
        assert torch.equal(guidance.redrawn, guidance.tested > threshold)
        flags += completion.redrawn
    assert 0 < sum(flags) < len(flags)


def test_what_the_prior_does_not_have_is_always_redrawn(pair) -> None:
    completions = resampler(pair, Trigger("ratio", 50.0)).start(requests(200)).finish()
    rejected = [t for completion in completions for t in completion.rejected if t >= 0]
    assert rejected and min(rejected) >= TOKENS
    assert max(max(completion.token_ids) for completion in completions) < TOKENS


def test_the_exact_law_of_the_emitted_tokens(pair) -> None:
    trigger = Trigger("ratio", 0.5)
    completions = resampler(pair, trigger).start(requests(20)).finish()
    policy, prior = pair
    law = mixture_logprobs(
        policy,
        prior,
        trigger,
        Ragged.of([completion.request.prompt_ids for completion in completions]),
        Ragged.of([completion.token_ids for completion in completions]),
        num_tokens=TOKENS,
    )
    mixtures = zip(completions, law.mu.split(), law.rates.split(), strict=True)
    for completion, mu_T, rates_T in mixtures:
        p, r = clean(pair[0], completion, ROWS).exp(), clean(pair[1], completion, TOKENS).exp()
        rejected = torch.log(p) - torch.log(r) > 0.5
        rate = (p * rejected).sum(-1)
        tokens = torch.tensor(completion.token_ids)[:, None]
        mu = (torch.where(rejected, 0.0, p) + rate[:, None] * r).gather(1, tokens)[:, 0]
        assert torch.allclose(rates_T.double(), rate, atol=1e-5)
        assert torch.allclose(mu_T.double(), mu.log(), atol=1e-4)


def test_whole_completions_are_scored_as_they_are(pair) -> None:
    completions = resampler(pair, Trigger("none")).start(requests(6)).finish()
    prior = TransformersPrior(pair[1], num_tokens=TOKENS, vocabulary_size=ROWS)
    found = prior.whole_completions(
        [completion.request.prompt_ids for completion in completions],
        [torch.tensor(completion.token_ids) for completion in completions],
    )
    for completion, logprobs in zip(completions, found, strict=True):
        tokens = torch.tensor(completion.token_ids)[:, None]
        expected = clean(pair[1], completion, TOKENS).gather(1, tokens)[:, 0]
        assert torch.allclose(logprobs.double(), expected, atol=1e-4)


def test_sliding_attention_is_refused() -> None:
    policy, _ = make_pair()
    policy.model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(PolicyError, match="full attention in every layer"):
        TransformersDrafter(policy, vocabulary_size=ROWS, eos_token_ids=EOS)
