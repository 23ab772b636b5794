from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exgrpo_fast.build import engines
from exgrpo_fast.config import validate
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Observer, Request, Sampling, request_seed
from exgrpo_fast.rollout.hf.drawing import hash_uniform, invert_cdf, keep_nucleus
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.shared_engine import AnnouncedPolicy

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (20, 21)]
REQUESTS = [Request(p, request_seed(0, 1, str(p), i)) for i in range(5) for p in PROMPTS]
EOS = 1


@pytest.fixture
def policy(model_folder) -> Policy:
    return Policy(load_model(str(model_folder)))


def engine(policy: Policy, max_batch_sequences: int = 64) -> TransformersEngine:
    return TransformersEngine(
        policy, eos_token_ids=[EOS], pad_token_id=0, max_batch_sequences=max_batch_sequences
    )


def assert_engine_agrees_with_trainer(policy: Policy, temperature: float) -> None:
    policy.temperature = temperature
    completions = engine(policy).generate(REQUESTS, Sampling(10, temperature))
    scores = policy.score(
        Ragged.of([r.prompt_ids for r in REQUESTS]), Ragged.of([c.token_ids for c in completions])
    ).split()
    for completion, (logprobs, _) in zip(completions, scores, strict=True):
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers_also_after_an_update(policy, temperature: float) -> None:
    assert_engine_agrees_with_trainer(policy, temperature)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_engine_agrees_with_trainer(policy, temperature)


def test_a_completion_depends_on_its_own_seed_only(policy) -> None:
    together = engine(policy).generate(REQUESTS, Sampling(10))
    in_threes = engine(policy, 3).generate(REQUESTS, Sampling(10))
    alone = [engine(policy).generate([request], Sampling(10))[0] for request in REQUESTS]
    for a, b, c in zip(together, in_threes, alone, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in together}) == len(REQUESTS)


# --- out of memory --------------------------------------------------------------------------------


@pytest.fixture
def rows_apart(monkeypatch) -> None:
    """The model's own forward pass draws, which sees every row."""
    monkeypatch.setattr("exgrpo_fast.rollout.hf.engine.can_be_decoded", lambda *_: False)


def out_of_memory_above(policy: Policy, limit: int) -> list[int]:
    """Filled with the rows of every refused forward pass of a generation from now on."""
    refused: list[int] = []

    def check(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > limit:
            refused.append(len(named["input_ids"]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore")

    policy.model.register_forward_pre_hook(check, with_kwargs=True)
    return refused


@pytest.mark.parametrize(("limit", "fitting", "refused"), [(10, 10, 1), (9, 5, 2), (1, 1, 4)])
@pytest.mark.usefixtures("rows_apart")
def test_a_batch_that_does_not_fit_is_generated_in_halves(
    policy, limit: int, fitting: int, refused: int
) -> None:
    expected = engine(policy).generate(REQUESTS, Sampling(10))
    halving, told = engine(policy), []
    observer = Observer()
    observer.finished = lambda places, completions: told.extend(places)
    found = out_of_memory_above(policy, limit)
    completions = halving.generate(REQUESTS, Sampling(10), observer)
    for ours, theirs in zip(completions, expected, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-6, rtol=0)
    assert halving.max_batch_sequences == fitting and len(found) == refused
    assert sorted(told) == list(range(len(REQUESTS)))
    halving.generate(REQUESTS, Sampling(10))
    assert len(found) == refused, "the number was not remembered"
    assert halving.sync(1) == {"generation_halvings": refused}
    assert halving.sync(2) == {"generation_halvings": 0}
    assert policy.model.training


@pytest.mark.usefixtures("rows_apart")
def test_where_not_one_sequence_can_be_generated_the_keys_are_named(policy) -> None:
    refused = out_of_memory_above(policy, 0)
    with pytest.raises(OutOfMemory) as caught:
        engine(policy, 4).generate(REQUESTS[:6], Sampling(10))
    assert str(caught.value) == (
        "out of memory in generation: not even one sequence of 16 tokens fits; lower "
        "rollout.max_completion_tokens or data.max_prompt_tokens, or take a smaller model"
    )
    assert "Tried to allocate 3.00 GiB." in caught.value.table
    assert len(refused) == 3  # of 4, 2, 1 sequences


@pytest.mark.usefixtures("rows_apart")
def test_the_copy_of_rank_0_generates_in_smaller_batches(policy, tokenizer, monkeypatch) -> None:
    """The other ranks wait for the completions alone."""
    monkeypatch.setattr(engines, "make_plain_policy", lambda *arguments, **options: policy)
    sharded: Any = SimpleNamespace(model=None, temperature=1.0, device=torch.device("cpu"))
    source = AnnouncedPolicy(sharded, Processes(RankInfo(count=2)))
    config = validate({"rollout": {"engine": "transformers"}})
    made = engines.transformers_engine(config, source, tokenizer, "folder")
    refused = out_of_memory_above(policy, 1)
    assert len(made.generate(REQUESTS[:4], Sampling(10))) == 4
    assert len(refused) == 2  # of 4 and of 2 sequences


def test_the_random_state_of_the_process_is_untouched(policy) -> None:
    before = torch.get_rng_state()
    engine(policy).generate(REQUESTS, Sampling(5))
    assert torch.equal(before, torch.get_rng_state())
    assert policy.model.training, "generation must leave the model in training mode"


def test_completions_end_with_the_end_token_or_are_truncated(policy) -> None:
    with torch.no_grad():  # an end token about every fourth position
        policy.head.weight[EOS] = 0.0
        policy.head.weight.mul_(0.05)
    completions = engine(policy).generate(REQUESTS, Sampling(300))
    for c in completions:
        ends = (c.token_ids == EOS).nonzero().flatten().tolist()
        assert ends == ([] if c.truncated else [len(c.token_ids) - 1])
        assert len(c.logprobs) == len(c.token_ids) <= 300
    cut = engine(policy).generate(REQUESTS, Sampling(1))
    assert all(c.truncated == (c.token_ids.tolist() != [EOS]) for c in cut)


def test_greedy_takes_the_most_likely_token(policy) -> None:
    (found,) = engine(policy).generate([REQUESTS[0]], Sampling(6, temperature=0.0))
    ids = list(REQUESTS[0].prompt_ids)
    for token in found.token_ids.tolist():
        with torch.no_grad():
            assert int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    seeds = torch.arange(40_000) * 7919
    drawn, _ = invert_cdf(probabilities.expand(40_000, 4), hash_uniform(seeds, 3))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(shares, probabilities, atol=0.01, rtol=0)
    assert shares[1] == 0.0


def test_uniform_numbers_of_positions_and_seeds_are_unrelated() -> None:
    seeds = torch.arange(4096)
    columns = torch.stack([hash_uniform(seeds, position) for position in range(8)])
    assert 0.0 < columns.min() and columns.max() < 1.0
    assert columns.mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 0.07
    again = hash_uniform(seeds[17:18], 5)
    assert again == columns[5, 17]


def test_the_largest_uniform_number_never_draws_an_impossible_token() -> None:
    almost_one = torch.tensor([1 - 2**-24])
    weights = torch.tensor([[0.7, 0.3, 0.0]])
    assert invert_cdf(weights, almost_one)[0].item() == 1


def test_nucleus_keeps_the_smallest_sufficient_set() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = keep_nucleus(logprobs, 0.6).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    assert keep_nucleus(logprobs, 1.0) is logprobs


def test_seeds_differ_in_every_part_of_their_place() -> None:
    base = (0, 1, "q", 2)
    variants = [(1, 1, "q", 2), (0, 2, "q", 2), (0, 1, "r", 2), (0, 1, "q", 3)]
    assert request_seed(*base) == request_seed(*base)
    assert len({request_seed(*v) for v in [base, *variants]}) == 5


def test_the_generation_settings_of_the_folder_have_no_influence(policy) -> None:
    """`generate` would draw two sequences a prompt, punish repetition, and keep no cache."""
    expected = engine(policy).generate(REQUESTS, Sampling(12))
    model: Any = policy.model
    model.config.use_cache = False
    for name, value in {
        "num_return_sequences": 2,
        "repetition_penalty": 2.0,
        "top_k": 1,
        "max_new_tokens": 3,
        "use_cache": False,
    }.items():
        setattr(model.generation_config, name, value)
    found = engine(policy).generate(REQUESTS, Sampling(12))
    for one, other in zip(expected, found, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert torch.equal(one.logprobs, other.logprobs)
