"""The decoding loop against transformers' own, its cache, and who leaves the batch when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config
from transformers.cache_utils import Cache

from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import Request, Sampling, request_seed
from exgrpo_fast.rollout.hf.decoding import GROWTH, Decoding, PreallocatedLayer
from exgrpo_fast.rollout.hf.drawing import BLOCK, draw, hash_uniform, invert_cdf
from exgrpo_fast.rollout.hf.engine import TransformersEngine

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14)]
EOS = 1


@pytest.fixture
def policy(model_folder, monkeypatch) -> Policy:
    """Of a family that is decoded by the model's own forward pass."""
    monkeypatch.setattr("exgrpo_fast.rollout.hf.engine.can_be_decoded", lambda *_: False)
    return Policy(load_model(str(model_folder)))


def requests(samples: int = 4, limit: int | None = None) -> list[Request]:
    return [
        Request(p, request_seed(0, 1, str(p), i), max_completion_tokens=limit)
        for p in PROMPTS
        for i in range(samples)
    ]


def batch_sizes(policy: Policy) -> list[int]:
    """Filled with the rows of every forward pass from now on."""
    found: list[int] = []

    def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        found.append(len(named["input_ids"]))

    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    return found


def engine(policy: Policy) -> TransformersEngine:
    return TransformersEngine(policy, eos_token_ids=[EOS], pad_token_id=0)


# ---- the loop ------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers_own_loop(policy) -> None:
    completions = engine(policy).generate(requests(1), Sampling(GROWTH + 20, temperature=0.0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            own: Any = policy.model.eval().generate(  # pyright: ignore[reportCallIssue]
                torch.tensor([prompt]),
                max_new_tokens=GROWTH + 20,
                do_sample=False,
                eos_token_id=EOS,
            )
        assert completion.token_ids.tolist() == own[0, len(prompt) :].tolist()


def test_a_prompt_is_read_once_for_all_of_its_samples(policy) -> None:
    sizes = batch_sizes(policy)
    engine(policy).generate(requests(4), Sampling(3))
    assert sizes == [3, 12, 12]


def test_a_row_at_its_limit_leaves_the_batch(policy) -> None:
    short, long = requests(4, limit=2)[:4], requests(4)[4:]
    sizes = batch_sizes(policy)
    completions = engine(policy).generate([*short, *long], Sampling(5))
    assert sizes == [3, 12, 8, 8, 8]
    assert [len(c.token_ids) for c in completions] == [2] * 4 + [5] * 8
    apart = engine(policy).generate(long, Sampling(5))
    for together, alone in zip(completions[4:], apart, strict=True):
        assert together.token_ids.tolist() == alone.token_ids.tolist()
        torch.testing.assert_close(together.logprobs, alone.logprobs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "sizes"), [(8, [3, 7, 7]), (9, [3, 9, 9])])
def test_rows_leave_once_an_eighth_has_ended(policy, rows: int, sizes: list[int]) -> None:
    first, *others = requests(4)[::4] + requests(2)  # all three prompts
    seen = batch_sizes(policy)
    limited = Request(first.prompt_ids, first.seed, max_completion_tokens=1)
    completions = engine(policy).generate([limited, *others][:rows], Sampling(3))
    assert seen == sizes
    assert [len(c.token_ids) for c in completions] == [1] + [3] * (rows - 1)


def test_a_device_that_works_ahead_is_asked_every_sixteen_tokens() -> None:
    decoding = Decoding(
        prompt_of=[0, 0],
        seeds=[1, 2],
        limits=[40, 40],
        sampling=Sampling(40),
        eos_token_ids=[EOS],
        device=torch.device("cpu"),
    )
    decoding.looks_every = 16
    decoding.going_B[1] = False
    kept = [decoding._kept(position) for position in range(33)]
    looks = [position for position, rows in enumerate(kept) if rows is not None]
    assert looks == [15, 31]
    assert kept[15] is not None and kept[15].tolist() == [0]


@pytest.mark.parametrize("window", [4, 100])
def test_layers_that_forget_are_left_as_they_are(window: int) -> None:
    """Gemma 2: every second layer sees a window."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=window,
        attn_logit_softcapping=None,
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))
    completions = engine(policy).generate(requests(2), Sampling(12))
    scores = policy.score(
        Ragged.of([r.prompt_ids for r in requests(2)]),
        Ragged.of([c.token_ids for c in completions]),
    )
    for completion, (logprobs, _) in zip(completions, scores.split(), strict=True):
        torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-5, rtol=0)


# ---- the cache -----------------------------------------------------------------------------------


def test_a_cache_with_room_holds_what_one_without_holds() -> None:
    plain: Any = DynamicCache()
    roomy: Any = Cache(layers=[PreallocatedLayer()])
    generator = torch.Generator().manual_seed(0)
    for length in (5, 1, 1, GROWTH, 1, 2 * GROWTH, 1):
        new = torch.randn(2, 3, 2, length, 4, generator=generator).unbind(0)
        pairs = zip(roomy.update(*new, 0), plain.update(*new, 0), strict=True)
        for mine, theirs in pairs:
            assert torch.equal(mine, theirs)
        if length == GROWTH:
            for cache in (plain, roomy):
                cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert roomy.get_seq_length() == plain.get_seq_length()
    assert isinstance(roomy.layers[0], PreallocatedLayer)


def test_a_token_is_written_in_place() -> None:
    layer, new = PreallocatedLayer(), torch.ones(1, 1, 1, 4)
    first, _ = layer.update(new, new)
    places = {layer.update(new, new)[0].data_ptr() for _ in range(GROWTH)}
    assert places == {first.data_ptr()}
    assert layer.update(new, new)[0].data_ptr() != first.data_ptr()


# ---- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_tokens_are_those_of_the_running_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(200, vocabulary, generator=generator, dtype=torch.float64) ** 8
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    drawn, total = invert_cdf(weights, uniform)
    cdf = weights.cumsum(1)
    assert torch.equal(drawn, (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1))
    torch.testing.assert_close(total, weights.sum(1))


@pytest.mark.parametrize("almost", [2**-24, 1 - 2**-24])
def test_no_token_of_weight_0_is_drawn_at_either_end_of_a_block(almost: float) -> None:
    """Each row has one possible token; numbers as near to 0 and 1 as there are."""
    weights = torch.eye(3 * BLOCK + 5)
    drawn, _ = invert_cdf(weights, torch.full((len(weights),), almost))
    assert drawn.tolist() == list(range(len(weights)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_softmax(temperature: float) -> None:
    logits = 20 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, *_ = draw(logits, torch.arange(64), 3, Sampling(1, temperature))
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)
    again = draw(logits[7:8], torch.tensor([7]), 3, Sampling(1, temperature))
    assert again[0] == tokens[7] and again[1] == logprobs[7]


def test_draws_of_a_large_vocabulary_follow_the_distribution() -> None:
    weights = torch.zeros(1000)
    weights[[0, 127, 128, 640, 999]] = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    drawn, _ = invert_cdf(weights.expand(40_000, -1), hash_uniform(torch.arange(40_000) * 31, 2))
    shares = torch.bincount(drawn, minlength=1000) / 40_000
    torch.testing.assert_close(shares, weights, atol=0.01, rtol=0)
    assert set(drawn.tolist()) == {0, 127, 128, 640, 999}
