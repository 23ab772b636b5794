"""Adapters: what is trained, what engines and checkpoints are given, what a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ScriptedEngine, make_questions
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from exgrpo_fast.build.models import adapter_of
from exgrpo_fast.build.quickstart.toy_model import make_model
from exgrpo_fast.build.run import restore_run
from exgrpo_fast.cli.export import export_checkpoint
from exgrpo_fast.config import ConfigError, validate
from exgrpo_fast.model.lora import (
    LoraError,
    add_adapter,
    load_adapter,
    merged_weights,
    random_adapter,
    running_merged,
    save_adapter,
    switched_off,
    trainable,
)
from exgrpo_fast.model.policy import load_model
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.run.sinks import MetricSink
from exgrpo_fast.training.trainer import Trainer

LORA = {"rank": 4, "alpha": 8.0}
IDS = torch.arange(3, 40)[None]


def disturb(model: PreTrainedModel) -> None:
    """B is 0 at the start: give it values, as training would."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return make_model(tokenizer, seed=0, layers=2, width=64).eval()


@pytest.fixture
def adapted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = make_model(tokenizer, seed=0, layers=2, width=64)
    add_adapter(model, rank=4, alpha=8.0)
    disturb(model)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


# --- the adapter ----------------------------------------------------------------------------------


def test_merged_weights_give_the_logits_of_the_adapter(
    adapted: PreTrainedModel, plain: PreTrainedModel
) -> None:
    away = (logits(adapted) - logits(plain)).abs().max()
    names = set(plain.state_dict())
    merged = dict(merged_weights(adapted))
    assert merged.keys() == names
    plain.load_state_dict(merged)
    assert (logits(adapted) - logits(plain)).abs().max() < 1e-5 < 1e-2 < away


def test_bfloat16_weights_are_merged_in_float32(tokenizer: PreTrainedTokenizerFast) -> None:
    """W + B A rounded to bfloat16 would lose most of what was learned."""
    model = make_model(tokenizer, seed=0, layers=2, width=64).bfloat16()
    add_adapter(model, rank=4, alpha=8.0)
    disturb(model)
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    weight = dict(merged_weights(model))["model.layers.1.mlp.up_proj.weight"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = layer.base_layer.weight.double() + 2.0 * (b.double() @ a.double())
    assert (weight.dtype, a.dtype, b.dtype) == (torch.float32,) * 3
    assert (weight - exact).abs().max() < 1e-6 < (weight.bfloat16() - exact).abs().max()


def test_a_tied_head_is_named_and_stays_tied(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(tokenizer, seed=0, layers=1, width=64)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    names = set(dict(merged_weights(model)))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names
    add_adapter(model, rank=2, alpha=2.0)
    assert set(dict(merged_weights(model))) == names
    assert set(dict(merged_weights(model, tied=False))) == names - {"lm_head.weight"}


def test_switched_off_it_is_the_initial_model(
    adapted: PreTrainedModel, plain: PreTrainedModel
) -> None:
    with_adapter = logits(adapted)
    with switched_off(adapted):
        assert torch.equal(logits(adapted), logits(plain))
    assert torch.equal(logits(adapted), with_adapter)
    assert len(trainable(adapted)) == 2 * 7 * 2  # A and B of 7 linear layers, 2 times


def test_the_seed_alone_draws_the_adapter(tokenizer: PreTrainedTokenizerFast) -> None:
    def drawn(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = make_model(tokenizer, seed=0, layers=1, width=64)
        before = torch.get_rng_state()
        add_adapter(model, rank=4, alpha=8.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.get_submodule("model.layers.0.mlp.up_proj.lora_A.default").weight  # pyright: ignore

    assert torch.equal(drawn(1, 0), drawn(1, 7))
    assert not torch.equal(drawn(1, 0), drawn(2, 0))


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (["lm_head"], "lm_head is the language-model head"),
        (["q_prj"], "qwen3 has no layer q_prj"),
        (["embed_tokens"], "embed_tokens is not a linear layer"),
    ],
)
def test_targets_that_cannot_be(plain: PreTrainedModel, targets: list[str], why: str) -> None:
    with pytest.raises(LoraError, match=why):
        add_adapter(plain, rank=2, alpha=2.0, targets=targets)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"lora": {"targets": ["q_proj", "lm_head"]}}, "model.lora.targets: the fused loss reads"),
        ({"lora": {"targets": ["all-linear", "q_proj"]}}, "give it alone"),
        ({"lora": {"rank": 0}}, "model.lora.rank"),
        ({"quantization": "nf4"}, "set model.lora as well"),
        ({"weights": "bfloat16", "dtype": "float32"}, "model.dtype float32 cannot come"),
    ],
)
def test_configs_that_cannot_be(model: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate({"model": model})


def test_the_folder_is_pefts_own(
    adapted: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path
) -> None:
    from peft import PeftModel

    save_adapter(adapted, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, logits(adapted))


def test_an_adapter_of_another_shape_is_refused(
    adapted: PreTrainedModel, plain: PreTrainedModel, tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path)
    add_adapter(plain, rank=8, alpha=8.0)
    with pytest.raises(LoraError, match="model.lora.rank: the checkpoint's adapter has 4, .* 8"):
        load_adapter(plain, tmp_path)
    with pytest.raises(LoraError, match="holds no adapter, and model.lora is set"):
        load_adapter(plain, tmp_path / "nowhere")


# --- through the trainer --------------------------------------------------------------------------


@pytest.fixture
def make_run(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Callable[..., Trainer]
) -> Callable[..., Trainer]:
    questions = make_questions(tokenizer, ["a", "b", "c", "d"])

    def make(**model: object) -> Trainer:
        engine = ScriptedEngine(tokenizer, questions)
        for _ in range(6):
            for question in questions:
                engine.expect(question.id, "right", "wrong", "wrong 3", "right 2")
        return make_test_trainer(
            questions,
            engine=engine,
            model={"lora": LORA} | model,
            algorithm={"kl": {"coef": 0.1}},
        )

    return make


def test_only_the_adapter_moves(make_run: Callable[..., Trainer]) -> None:
    trainer = make_run()
    model = trainer.learner.policy.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.step()
    trainer.step()  # B is 0 at first, and A moves from the second update on
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if ".lora_" in name}


def test_the_reference_is_the_model_without_adapter(make_run: Callable[..., Trainer]) -> None:
    trainer = make_run()
    _, first = trainer.step()
    _, second = trainer.step()
    assert first["kl_ref"] == 0.0 < second["kl_ref"]


def same_states(a: dict, b: dict) -> bool:
    return json.dumps(a, default=lambda t: t.tolist()) == json.dumps(
        b, default=lambda t: t.tolist()
    )


def test_a_resumed_run_goes_on_bit_for_bit(
    make_run: Callable[..., Trainer], tmp_path: Path
) -> None:
    through = make_run()
    losses = [through.step()[1]["loss_hex"] for _ in range(4)]
    assert len(set(losses)) == 4

    first = make_run()
    assert [first.step()[1]["loss_hex"] for _ in range(2)] == losses[:2]
    saved = first.save()
    second = make_run()
    load_adapter(second.learner.policy.model, saved / "adapter")
    restore_run(second, load_state(saved))
    for script in second.engine.lines.values():  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(8):
            script.popleft()
    assert [second.step()[1]["loss_hex"] for _ in range(2)] == losses[2:]
    assert same_states(second.learner.state_dict(), through.learner.state_dict())


def test_a_checkpoint_loads_anywhere(make_run: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_run()
    trainer.step()
    trainer.step()
    saved = trainer.save()
    plain = AutoModelForCausalLM.from_pretrained(saved / "hf").eval()
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    ours = trainer.learner.policy.model.eval()
    assert (logits(plain) - logits(ours)).abs().max() < 1e-5
    exported = tmp_path / "out"
    export_checkpoint(saved, "adapter", exported)
    assert sorted(f.name for f in exported.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    export_checkpoint(saved, "merged", tmp_path / "merged")
    names = {f.name for f in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names


def test_a_run_of_the_other_kind_does_not_resume(
    make_run: Callable[..., Trainer], make_test_trainer: Callable[..., Trainer]
) -> None:
    saved = make_run().save()
    whole = validate({})
    with pytest.raises(ConfigError, match="holds an adapter, and model.lora is not set"):
        adapter_of(whole, saved)
    assert adapter_of(validate({"model": {"lora": {}}}), saved) == saved / "adapter"
    assert adapter_of(whole, None) is None


def test_the_transformers_engine_draws_from_the_adapted_model(
    tokenizer: PreTrainedTokenizerFast, make_test_trainer: Callable[..., Trainer]
) -> None:
    questions = make_questions(tokenizer, ["a", "b"])
    trainer = make_test_trainer(questions, model={"lora": LORA})
    policy = trainer.learner.policy
    disturb(policy.model)
    (drawn,) = trainer.engine.generate([Request(questions[0].prompt_ids, seed=3)], Sampling(8))
    model = load_model(str(policy.model.config.name_or_path)).eval()
    model.load_state_dict(dict(policy.named_weights()))
    ids = torch.tensor([[*questions[0].prompt_ids, *drawn.token_ids.tolist()]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    start = len(questions[0].prompt_ids) - 1
    exact = logprobs[start:-1].gather(1, drawn.token_ids[:, None])[:, 0]
    assert (drawn.logprobs - exact).abs().max() < 1e-5
    assert type(trainer.sink) is MetricSink


def test_inputs_of_adapters_are_not_copied_to_float32(model_folder: Path) -> None:
    """Beside peft's own cast, which autocast undoes: the same bits, and less is kept."""

    def run(casts: bool) -> tuple[list[torch.Tensor], int]:
        model = load_model(str(model_folder), dtype=torch.bfloat16)
        add_adapter(model, rank=4, alpha=8.0)
        wide = 0
        for name, module in model.named_modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = casts  # pyright: ignore
            if name.endswith("lora_A.default"):

                def count(layer: Any, given: Any) -> None:
                    nonlocal wide
                    wide += given[0].dtype == torch.float32

                module.register_forward_pre_hook(count)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(input_ids=torch.arange(20)[None]).last_hidden_state
        hidden.float().square().sum().backward()
        return [hidden, *(p.grad for p in trainable(model) if p.grad is not None)], wide

    (ours, none), (pefts, all_of_them) = run(casts=False), run(casts=True)
    assert (none, all_of_them) == (0, 14)
    assert len(ours) == len(pefts) == 29
    assert all(torch.equal(a, b) for a, b in zip(ours, pefts, strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in ours[1:])


def test_the_adapter_of_a_new_run_does_not_cast(model_folder: Path) -> None:
    model = load_model(str(model_folder), dtype=torch.bfloat16)
    add_adapter(model, rank=4, alpha=8.0)
    casts = [getattr(m, "cast_input_dtype_enabled", False) for m in model.modules()]
    assert not any(casts)


def test_an_adapter_on_conv1d_is_merged_as_it_lies() -> None:
    """GPT-2's layers keep [in, out]; c_proj of a square layer would be transposed in silence."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).eval()
    add_adapter(model, rank=4, alpha=8.0, targets=["c_attn", "c_proj"])
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), random_adapter(model):
        adapted = model(ids).logits
        merged = GPT2LMHeadModel(model.config).eval()
        merged.load_state_dict(dict(merged_weights(model)))
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-5, rtol=0)
        with running_merged(model):
            torch.testing.assert_close(model(ids).logits, adapted, atol=1e-5, rtol=0)
        with switched_off(model):
            assert (model(ids).logits - adapted).abs().max() > 1e-2


def tiny_mixture() -> PreTrainedModel:
    """Dense in the first layer, experts in the second, beside one that is shared."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    sizes |= {"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    sizes |= {"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


def test_of_a_mixture_the_attention_is_adapted() -> None:
    """peft's all-linear takes the fused experts along; their update was lost in the merge."""
    model = tiny_mixture().eval()
    add_adapter(model, rank=2, alpha=4.0)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 10 and all("self_attn" in name for name in adapted)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), random_adapter(model):
        expected = model(ids).logits
        plain = tiny_mixture().eval()
        plain.load_state_dict(dict(merged_weights(model)))
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["gate_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_targets_that_peft_takes_for_experts_are_refused(targets: list[str]) -> None:
    with pytest.raises(LoraError, match="model.lora.targets: "):
        add_adapter(tiny_mixture(), rank=2, alpha=4.0, targets=targets)
