"""Settings of a model's folder: taken, overridden and named, or refused before weights are loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import exit_code
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    T5Config,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from exgrpo_fast.build.folder import check_folder, completion_room, refuse_too_long
from exgrpo_fast.build.forward import check_model
from exgrpo_fast.cli.doctor import check_forward_pass
from exgrpo_fast.config import Config, ConfigError, validate
from exgrpo_fast.model.folder_reading import (
    PlainConfig,
    PolicyError,
    load_tokenizer,
    read_generation_config,
)
from exgrpo_fast.model.folder_settings import positions, refuse_quantised
from exgrpo_fast.model.lora import save_plain
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.model.weight_files import LLAMA_LIKE, llama_shapes, refuse_other_shapes

Edit = Callable[..., Path]


@pytest.fixture
def edited(model_folder: Path, tmp_path: Path) -> Edit:
    """edited(file, **values): a copy of the folder with values of one JSON file changed."""

    def edit(file: str, **values: Any) -> Path:
        copy = tmp_path / "edited"
        if not copy.exists():
            shutil.copytree(model_folder, copy)
        path = copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return copy

    return edit


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    return validate({"model": {"name": str(folder)}} | sections)


def lines_of(folder: Path, **sections: dict[str, Any]) -> list[str]:
    return check_folder(config_of(folder, **sections), str(folder), load_tokenizer(str(folder)))


# --- overridden and named -------------------------------------------------------------------------


def test_a_plain_folder_has_nothing_to_say(model_folder: Path) -> None:
    assert lines_of(model_folder) == []


def test_sampling_defaults_are_named_and_kept_in_checkpoints(edited: Edit, tmp_path: Path) -> None:
    """num_return_sequences with greedy decoding: transformers refuses to load or save it."""
    folder = edited("generation_config.json", num_return_sequences=2, temperature=0.6, top_p=1.0)
    (line,) = lines_of(folder)
    assert (
        "not followed: temperature 0.6, num_return_sequences 2 (the sections rollout and eval of the config say"
        in line
    )
    model = load_model(str(folder))
    assert model.generation_config is not None
    assert model.generation_config.temperature == 0.6
    model.save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).generation_config.num_return_sequences == 1  # type: ignore


def test_a_cache_that_is_switched_off_is_used_all_the_same(edited: Edit) -> None:
    folder = edited("config.json", use_cache=False)
    assert "use_cache False" in lines_of(folder)[0]
    assert "engine" in check_model(str(folder), device="cpu")


def test_dropout_is_off_unless_it_is_asked_for(edited: Edit) -> None:
    folder = edited("config.json", attention_dropout=0.3)
    assert "attention_dropout 0.3" in lines_of(folder)[0]
    assert lines_of(folder, model={"name": str(folder), "dropout": True}) == []
    ids = Ragged.of([(5, 6, 7, 8)]), Ragged.of([torch.arange(9, 20)])
    for dropout in (False, True):
        policy = Policy(load_model(str(folder)), dropout=dropout)
        same = torch.equal(
            policy.score(*ids).logprobs, policy.score_in_training_mode(*ids).logprobs
        )
        assert same is not dropout


def test_a_turn_end_that_is_no_end_token_is_said(edited: Edit) -> None:
    template = "{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}"
    folder = edited("tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    (line,) = lines_of(folder)
    assert line.startswith("warning: the chat template ends an answer with <|assistant|>, which is")
    token = load_tokenizer(str(folder)).convert_tokens_to_ids("<|assistant|>")
    edited("generation_config.json", eos_token_id=[1, token])
    assert lines_of(folder) == []


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "mxfp4", "fp8"])
def test_quantised_weights_are_refused(method: str, edited: Edit) -> None:
    folder = edited("config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        PolicyError, match=rf"quantised already \({method}\), and cannot be trained"
    ):
        lines_of(folder)
    with pytest.raises(PolicyError, match="unknown method"):
        refuse_quantised(SimpleNamespace(quantization_config={"bits": 4}), "x")


def test_a_model_that_is_no_causal_language_model_is_refused(edited: Edit) -> None:
    folder = edited("config.json")
    T5Config().save_pretrained(folder)
    with pytest.raises(PolicyError, match="no causal language model of type t5"):
        lines_of(folder)


def test_layers_that_packs_cannot_hold_are_refused_before_the_weights(edited: Edit) -> None:
    folder = edited("config.json", layer_types=["full_attention", "linear_attention"])
    with pytest.raises(PolicyError, match="layers of linear_attention are not supported"):
        lines_of(folder)


@pytest.mark.parametrize(
    "weight",
    [
        "model.layers.1.self_attn.o_proj.bias",  # of a module that the model has
        "model.layers.0.post_mlp_norm.weight",  # of a layer that it has
        "lm_head.bias",
    ],
)
def test_a_weight_that_the_model_has_no_place_for_is_refused(weight: str, edited: Edit) -> None:
    """transformers drops it, and the rest is another model."""
    folder = edited("config.json")
    weights = load_file(folder / "model.safetensors")
    harmless = ["v_head.weight", "vision.layers.0.q.weight", "model.layers.0.self_attn.inv_freq"]
    weights |= {name: torch.ones(64) for name in harmless}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(folder))
    weights[weight] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=f"its files hold {re.escape(weight)}, and the model of"):
        load_model(str(folder))


def test_an_attention_that_is_not_installed_is_one_line(edited: Edit) -> None:
    """transformers raises an ImportError."""
    folder = edited("config.json", attn_implementation="flash_attention_2")
    with pytest.raises(PolicyError, match=r"model.name .*edited: .*lash.?[Aa]tt"):
        load_model(str(folder))


def test_an_embedding_smaller_than_the_tokenizer_is_refused(edited: Edit) -> None:
    folder = edited("config.json", vocab_size=200)
    with pytest.raises(
        PolicyError, match=r"has 284 tokens \(ids up to 283\), and the embedding 200"
    ):
        lines_of(folder)


def test_special_tokens_that_no_text_contains_may_lie_beyond(
    model_folder: Path, edited: Edit
) -> None:
    """Gemma 3's text models have one for images behind their embedding."""
    tokenizer = load_tokenizer(str(model_folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == 285
    folder = edited("config.json", vocab_size=284)
    assert check_folder(config_of(folder), str(folder), tokenizer) == []


CONTRADICTING = [
    {"do_sample": False, "temperature": 0.6, "num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 1, "cache_implementation": "none such"},
    {"use_cache": False, "cache_implementation": "static"},
    {"num_return_sequences": 2, "do_sample": False},
]


@pytest.mark.parametrize("settings", CONTRADICTING)
def test_of_generation_settings_that_contradict_each_other_the_token_ids_stay(
    settings: dict[str, Any], edited: Edit, tmp_path: Path
) -> None:
    """transformers refuses to save them, which would end a run at its first checkpoint."""
    folder = edited("generation_config.json", eos_token_id=[1, 7], **settings)
    model = load_model(str(folder))
    save_plain(model, tmp_path / "saved")
    for name in (folder, tmp_path / "saved"):
        found = read_generation_config(str(name))
        assert found and found.eos_token_id == [1, 7] and found.num_beams in (None, 1)
    model.generation_config.validate(strict=True)


def test_a_generation_config_that_is_no_json_is_refused(edited: Edit) -> None:
    folder = edited("config.json")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(PolicyError, match=r"generation_config.json: "):
        lines_of(folder)


def test_an_end_token_beyond_the_embedding_is_refused(edited: Edit) -> None:
    folder = edited("generation_config.json", eos_token_id=[1, 99_999])
    with pytest.raises(PolicyError, match=r"names the end token 99999, and the embedding has"):
        lines_of(folder)


def without_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.q_proj.weight"]


def with_a_narrow_weight(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name][:8].clone()


def with_another_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "change, said",
    [
        (without_a_weight, r"lack 1 weights of its config.json, such as model.layers.1.self_attn"),
        (with_a_narrow_weight, r"q_proj.weight is \[8, \d+\] in its files, and \[\d+, \d+\] by"),
        (with_another_layer, r"hold model.layers.2.self_attn.q_proj.weight, and .* 2 layers"),
    ],
)
def test_files_that_are_not_those_of_the_config_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, edited: Edit
) -> None:
    """transformers would give random values to what is missing, and drop a layer too many."""
    folder = edited("config.json")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=said):
        load_model(str(folder))


def test_a_layer_too_many_is_refused_whatever_the_family_calls_it(tmp_path: Path) -> None:
    config = OPTConfig(
        num_hidden_layers=2,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_attention_heads=2,
        vocab_size=64,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    load_model(str(tmp_path))
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"hold model.decoder.layers.1.* config.json 1 layers"):
        load_model(str(tmp_path))


def test_a_truncated_file_of_weights_is_one_line(edited: Edit) -> None:
    weights = edited("config.json") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(
        PolicyError, match=r"^model.name .*: model.safetensors is damaged: .* header"
    ):
        load_model(str(weights.parent))


@pytest.mark.parametrize(
    "words, where",
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantised already (awq)"),
        ({"vocab_size": 200}, "the embedding 200 rows"),
        ({"max_position_embeddings": 20}, "more than the 20 positions"),
    ],
)
def test_the_commands_answer_in_one_line_before_weights_are_loaded(
    words: dict[str, Any],
    where: str,
    edited: Edit,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = edited("config.json", **words)
    (folder / "model.safetensors").unlink()  # whoever opens the weights fails otherwise
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "answer": "3"}) + "\n" for i in range(3))
    )
    eval_ = ["eval", "--model", folder, "--data", rows, "--prompt-field", "prompt"]
    eval_ += ["--max-completion-tokens", "64", "--device", "cpu"]
    train = ["train", "grpo", "--model.name", folder, "--data.train", rows, "--device", "cpu"]
    train += ["--out", tmp_path / "run", "--rollout.max_completion_tokens", "64", "--no-supervise"]
    train += ["--data.check_answers", "false", "--rollout.prompts_per_step", "2"]
    for each in (eval_, train):
        assert exit_code(*each) == 2
        error = capsys.readouterr().err
        assert where in error and "Traceback" not in error
        assert len([line for line in error.splitlines() if "exgrpo-fast: " in line]) == 1


# --- positions ------------------------------------------------------------------------------------


def test_positions_of_a_config() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    phi3 = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters=long,
        pad_token_id=0,
    )
    found = {
        "llama": positions(LlamaConfig(max_position_embeddings=512)),
        "dynamic": positions(LlamaConfig(max_position_embeddings=512, rope_parameters=dynamic)),
        "longrope": positions(phi3),
        "learned": positions(GPT2Config(n_positions=64)),
    }
    limits = {name: (p.limit, p.is_rotary, p.binds) for name, p in found.items() if p}
    assert limits == {
        "llama": (512, True, False),
        "dynamic": (512, True, True),
        "longrope": (1024, True, True),
        "learned": (64, False, True),
    }


def test_positions_of_a_config_json_of_older_releases() -> None:
    """Read without the model's class, which would rename its keys."""
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    plain = PlainConfig(max_position_embeddings=512, rope_theta=1e4)
    scaled = PlainConfig(max_position_embeddings=512, rope_theta=1e4, rope_scaling=scaling)
    none = PlainConfig(max_position_embeddings=512)
    limits = [(p.limit, p.is_rotary, p.binds) for p in map(positions, (plain, scaled, none)) if p]
    assert limits == [(512, True, False), (128, True, True), (512, False, True)]


def test_frequencies_that_follow_the_length_are_used_as_far_as_they_do_not() -> None:
    """Dynamic NTK: a long sequence in a pack would change the short one's log-probs."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope))
    policy = Policy(model)
    prompts = [(5, 6, 7), tuple(range(3, 43))]
    alone = policy.score(Ragged.of(prompts[:1]), Ragged.of([torch.arange(8, 20)])).logprobs
    beside = [torch.arange(8, 20), torch.arange(8, 32)]
    both = policy.score(Ragged.of(prompts), Ragged.of(beside)).split()[0][0]
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=0)
    with pytest.raises(
        PolicyError, match="a sequence of 71 tokens is longer than its 64 positions"
    ):
        policy.score(Ragged.of(prompts), Ragged.of([beside[0], torch.arange(8, 39)]))


def test_sequences_longer_than_the_positions_are_refused(edited: Edit) -> None:
    folder = edited("config.json", max_position_embeddings=64)
    config = config_of(folder, rollout={"max_completion_tokens": 40})
    refuse_too_long(config, str(folder), longest_prompt=24)
    assert completion_room(config, str(folder), longest_prompt=30) == 34
    with pytest.raises(
        ConfigError, match=r"a prompt of 25 tokens and .* \(40\) are more than the 64"
    ):
        refuse_too_long(config, str(folder), longest_prompt=25)
    allowed = config_of(
        folder, rollout={"max_completion_tokens": 40}, train={"allow_mismatch": True}
    )
    refuse_too_long(allowed, str(folder), longest_prompt=25)
    hindsight = config_of(
        folder,
        rollout={"max_completion_tokens": 40},
        hindsight={"enabled": True, "max_prompt_tokens": 100},
    )
    with pytest.raises(ConfigError, match=r"hindsight.max_prompt_tokens \(100\) and"):
        refuse_too_long(hindsight, str(folder), longest_prompt=5)


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_checks_the_forward_pass_of_a_folder(model_folder: Path, edited: Edit) -> None:
    check = check_forward_pass(model_folder)
    assert check.status == "ok" and check.detail.startswith("forward pass checked: packed ")
    check = check_forward_pass(edited("config.json", quantization_config={"quant_method": "awq"}))
    assert check.status == "fail" and "quantised already (awq)" in check.detail


@pytest.mark.parametrize(
    "values", [{"hidden_act": "zwish"}, {"rope_parameters": {"rope_type": "zwish"}}]
)
def test_what_transformers_has_no_code_for_is_said_in_one_line(
    values: dict[str, Any], edited: Edit
) -> None:
    with pytest.raises(PolicyError, match="^model.name .*'zwish'$"):
        load_model(str(edited("config.json", **values)))


# --- shapes that are known before the model's class -----------------------------------------------


SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("kind", sorted(LLAMA_LIKE))
@pytest.mark.parametrize("sizes", [SIZES | {"head_dim": 12}, SIZES], ids=["head_dim", "none"])
def test_shapes_by_the_config_are_those_of_the_class(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    if "head_dim" not in sizes:
        written.pop("head_dim", None)  # older folders lack it, and families differ in its default
    known = llama_shapes(PlainConfig(**written))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    own = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert len(known) == (16 if "head_dim" in sizes else 8)
    assert known == {name: own[name] for name in known}
    assert get_checkpoint_conversion_mapping(kind) is None  # the files use these names


def test_other_names_and_families_are_left_to_the_class() -> None:
    sizes = SIZES | {"head_dim": 12, "model_type": "llama"}
    named = {"embed_tokens.weight": [301, 48], "layers.0.q.weight": [7, 48], "layers.1.q": [1]}
    refuse_other_shapes(PlainConfig(**sizes), named, "model.name m")
    quantised = PlainConfig(**sizes, quantization_config={"quant_method": "awq"})
    refuse_other_shapes(quantised, {"embed_tokens.weight": [1, 1]}, "model.name m")
    ahead = {**named, "layers.2.q": [1]}  # a layer that predicts a further token
    refuse_other_shapes(PlainConfig(**sizes, num_nextn_predict_layers=1), ahead, "model.name m")
    two_towers = {**ahead, "vision.layers.0.q": [1]}
    refuse_other_shapes(PlainConfig(**sizes), two_towers, "model.name m")
    with pytest.raises(PolicyError, match="hold 3 layers"):
        refuse_other_shapes(PlainConfig(**sizes), ahead, "model.name m")
    for other in ({"model_type": "gpt2"}, {"quantization_config": {"quant_method": "awq"}}):
        assert llama_shapes(PlainConfig(**sizes | other)) == {}
    tied = {**llama_shapes(PlainConfig(**sizes)), "lm_head.weight": [301, 48]}
    del tied["model.embed_tokens.weight"]  # saved under the name of the head
    refuse_other_shapes(PlainConfig(**sizes), tied, "model.name m")
