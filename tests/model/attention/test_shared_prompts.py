"""Shared prompts through whole models: against the plain model, each completion alone."""

from __future__ import annotations

import functools
from typing import Any

import attention_cases
import pytest
import torch
from attention_cases import FlashAttn, VarlenAttn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from exgrpo_fast.build.models import make_policy
from exgrpo_fast.config import ConfigError, validate
from exgrpo_fast.model.attention import varlen
from exgrpo_fast.model.attention.backends import BackendName
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.packing import Pack, Ragged, pack
from exgrpo_fast.model.policy import Policy, PolicyError

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
WINDOW: dict[str, Any] = {"sliding_window": 5}
MODELS: dict[str, Any] = {
    "qwen2, grouped": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3, grouped": Qwen3Config(**SIZES, num_key_value_heads=2),
    "llama, every head": LlamaConfig(**SIZES, num_key_value_heads=4),
    "llama, one key head": LlamaConfig(**SIZES, num_key_value_heads=1),
    "mistral, window": MistralConfig(**SIZES, **WINDOW, num_key_value_heads=2),
    "gemma3, window in one layer": Gemma3TextConfig(
        **SIZES,
        **WINDOW,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# three prompts, the first of them twice in the list as different objects
ASKED = [(5, 6, 7, 8, 9, 3, 2), (11,), (20, 21, 22)]
PROMPTS = [ASKED[0], ASKED[1], ASKED[0], ASKED[2], ASKED[0], ASKED[1], tuple(list(ASKED[0]))]
LENGTHS = [4, 9, 1, 6, 7, 1, 2]
COMPLETIONS = [torch.randint(80, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back ends whose kernels run on CUDA alone get them by their documentation."""
    monkeypatch.setattr(varlen, "flash_kernel", FlashAttn)
    told = functools.partial(functools.partial, enable_gqa=True)
    monkeypatch.setattr(varlen, "varlen_kernel", lambda: told(VarlenAttn()))
    monkeypatch.setattr("exgrpo_fast.model.policy.refusal", lambda name, **where: None)


def cotangent(index: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randn(LENGTHS[index], width, generator=generator)


def alone(model: PreTrainedModel) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The hidden states that predict each completion, and the gradients of all of them."""
    found = []
    for index, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[*prompt, *completion.tolist()[:-1]]])
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found.append(hidden[0, len(prompt) - 1 :])
        (found[-1] * cotangent(index, hidden.shape[-1])).sum().backward()
    return [h.detach() for h in found], gradients(model)


def packed(policy: Policy, packs: list[Pack]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    found: dict[int, torch.Tensor] = {}
    for one in packs:
        hidden = policy.hidden_states(one)
        pieces = dict(zip(one.index, hidden.split(one.lengths), strict=True))
        terms = [(h * cotangent(i, h.shape[-1])).sum() for i, h in pieces.items()]
        torch.stack(terms).sum().backward()
        found |= {i: h.detach() for i, h in pieces.items()}
    return [found[i] for i in range(len(LENGTHS))], gradients(policy.model)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("max_tokens", [20, 10_000])
@pytest.mark.parametrize("backend", ["sdpa", "flash", "varlen"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_each_completion_alone(
    name: str, backend: BackendName, max_tokens: int, checkpointing: bool
) -> None:
    expected, expected_gradients = alone(make_model(name))
    policy = Policy(make_model(name), attention=backend, gradient_checkpointing=checkpointing)
    packs = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=max_tokens)
    found, found_gradients = packed(policy, packs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert found_gradients.keys() == expected_gradients.keys()
    for key, theirs in expected_gradients.items():
        scale = float(theirs.abs().max())
        torch.testing.assert_close(found_gradients[key], theirs, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_adapters_get_the_same_gradients(backend: BackendName) -> None:
    models = [make_model("qwen3, grouped") for _ in range(2)]
    for model in models:
        add_adapter(model, rank=4, alpha=8.0, seed=1)
        for key, weight in model.named_parameters():
            if "lora_B" in key:  # zero at the start, which would hide the gradient of lora_A
                torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(2))
    _, expected = alone(models[0])
    policy = Policy(models[1], attention=backend, gradient_checkpointing=True)
    packs = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=10_000)
    _, found = packed(policy, packs)
    assert found.keys() == expected.keys() and all("lora" in key for key in found)
    for key, theirs in expected.items():
        scale = float(theirs.abs().max())
        torch.testing.assert_close(found[key], theirs, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_under_autocast_a_kernel_is_given_one_dtype(
    backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated queries and keys are float32 there, values bfloat16, and the kernels cast nothing."""
    policy = Policy(make_model("qwen3, grouped"), attention=backend, compute_dtype=torch.bfloat16)
    (one,) = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=10_000)
    seen: set[torch.dtype] = set()
    kernel = attention_cases.sequences

    def look(qkv: Any, *rest: Any) -> torch.Tensor:
        seen.update(x.dtype for x in qkv)
        return kernel(qkv, *rest)

    monkeypatch.setattr(attention_cases, "sequences", look)
    assert policy.hidden_states(one).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}


# --- packs ----------------------------------------------------------------------------------------


def test_each_prompt_is_read_once_in_a_pack() -> None:
    (one,) = pack(Ragged.of(PROMPTS), Ragged.of(COMPLETIONS), max_tokens=10_000)
    prompts, read = sum(map(len, ASKED)), sum(LENGTHS) - len(LENGTHS)
    assert len(one.input_ids) == prompts + read == one.layout.num_tokens
    assert one.index == (4, 0, 6, 2, 1, 5, 3)  # by the longest of its prompt, then the longest
    ids, positions = one.input_ids.tolist(), one.position_ids.tolist()
    start = 0
    for prompt, members in (
        (ASKED[0], (4, 0, 6, 2)),
        (ASKED[1], (1, 5)),
        (ASKED[2], (3,)),
    ):
        expected, places = list(prompt), list(range(len(prompt)))
        for member in members:
            expected += COMPLETIONS[member].tolist()[:-1]
            places += range(len(prompt), len(prompt) + LENGTHS[member] - 1)
        assert ids[start : start + len(expected)] == expected
        assert positions[start : start + len(places)] == places
        start += len(expected)
    rows = one.rows.split(one.lengths)
    assert [int(r[0]) for r in rows] == [6, 6, 6, 6, 17, 17, 28]  # the last tokens of the prompts
    targets = one.targets.split(one.lengths)
    for member, of_member in zip(one.index, targets, strict=True):
        assert torch.equal(of_member, COMPLETIONS[member])


def test_a_group_that_does_not_fit_reads_its_prompt_again() -> None:
    prompts, completions = [(1, 2, 3, 4)] * 5, [torch.arange(5, 9)] * 5
    packs = pack(Ragged.of(prompts), Ragged.of(completions), max_tokens=12)
    assert [len(p.input_ids) for p in packs] == [10, 10, 7]  # a prompt of 4, completions of 3
    assert [p.index for p in packs] == [(0, 1), (2, 3), (4,)]
    assert all(p.input_ids[:4].tolist() == [1, 2, 3, 4] for p in packs)
    (whole,) = pack(Ragged.of(prompts), Ragged.of(completions), max_tokens=19)
    assert len(whole.input_ids) == 19
    assert pack(Ragged.of([]), Ragged.of([]), max_tokens=19) == []


def test_a_sequence_that_is_too_long_stands_alone() -> None:
    prompts, completions = (
        [(1, 2, 3), (1, 2, 3), (4,)],
        [torch.arange(30), torch.arange(2), torch.arange(3)],
    )
    packs = pack(Ragged.of(prompts), Ragged.of(completions), max_tokens=10)
    assert [(p.index, len(p.input_ids)) for p in packs] == [((0,), 32), ((1, 2), 7)]


def test_prompts_are_told_apart_by_all_their_tokens() -> None:
    prompts = [(1, 2), (1, 2, 3), (12,), (2, 1), (1, 2)]
    (one,) = pack(Ragged.of(prompts), Ragged.of([torch.arange(2)] * 5), max_tokens=100)
    assert len(one.input_ids) == 8 + 5


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
def test_an_impossible_back_end_is_refused_before_the_model_is_loaded(name: str) -> None:
    config = validate({"model": {"name": "nowhere", "attention": name}})
    with pytest.raises(ConfigError, match=f"^model.attention {name} needs a CUDA device, not cpu"):
        make_policy(config, "nowhere", device="cpu")


def test_layers_that_are_no_attention_are_refused() -> None:
    model = make_model("qwen2, grouped")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(PolicyError, match="layers of linear_attention are not supported"):
        Policy(model)
