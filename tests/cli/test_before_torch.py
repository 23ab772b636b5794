"""Mistakes in a model's folder and its data: one line and exit code 2, before torch is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from several_processes import environment
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    VaultGemmaConfig,
)

from exgrpo_fast.run.checkpoint.manifest import write_manifest

Damage = Callable[[Path], object]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


class Case(NamedTuple):
    name: str
    damage: Damage
    said: str
    command: str = "train"
    more: tuple[str, ...] = ()


class Outcome(NamedTuple):
    code: int
    has_torch: bool  # which transformers' own tokenizer has not loaded
    said: str


def nothing(folder: Path) -> None: ...


def setting(file: str, **values: Any) -> Damage:
    """Values of one JSON file changed; None takes them out."""

    def change(folder: Path) -> None:
        path = folder / file
        found = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def template(content: str) -> Damage:
    return text("chat_template.jinja", content)


def config(made: PreTrainedConfig) -> Damage:
    return lambda folder: made.save_pretrained(folder)


def slow_tokenizer(*changes: Damage) -> Damage:
    """vocab.json and merges.txt, as GPT-2 has them, in the place of tokenizer.json."""

    def make(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|end|>")
        setting("tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **special)(folder)
        for change in changes:
            change(folder)

    return make


def family(config: PreTrainedConfig, **values: Any) -> Damage:
    """Weights of another family than Llama's, whose config is changed then."""

    def make(folder: Path) -> None:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        setting("config.json", **values)(folder)

    return make


def beside(name: str, change: Damage) -> Damage:
    """Another model in the folder of the run, changed."""

    def make(folder: Path) -> None:
        shutil.copytree(folder, folder.with_name(name))
        change(folder.with_name(name))

    return make


def another_token(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)


def rewards(folder: Path) -> None:
    folder.with_name("rewards.py").write_text(REWARDS)
    folder.with_name("broken.py").write_text("from nowhere_at_all import found\n")


def gguf(content: bytes) -> Damage:
    """The folder holds this file alone."""

    def make(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / "m.gguf").write_bytes(content)

    return make


def gguf_header(architecture: str, chat_template: str = "", context_length: int = 0) -> bytes:
    """Settings, and one tensor of 4 times 8 floats that is not there."""

    def word(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    tensor = word("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    settings = [word("general.architecture") + struct.pack("<I", 8) + word(architecture)]
    if chat_template:
        settings += [word("tokenizer.chat_template") + struct.pack("<I", 8) + word(chat_template)]
    if context_length:
        key = word(f"{architecture}.context_length")
        settings += [key + struct.pack("<II", 4, context_length)]
    counts = struct.pack("<IQQ", 3, 1, len(settings))
    return b"GGUF" + counts + b"".join(settings) + tensor


def usable_gguf(chat_template: str = "", context_length: int = 0) -> Damage:
    return gguf(gguf_header("llama", chat_template, context_length) + bytes(200))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    for file, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one_shard_lost(folder: Path) -> None:
    sharded(folder)
    (folder / SHARDS[1]).unlink()


def one_shard_of_another_model(folder: Path) -> None:
    sharded(folder)
    part = load_file(folder / SHARDS[1])
    part.pop("model.norm.weight")
    save_file(part, folder / SHARDS[1], metadata={"format": "pt"})


REWARDS = """
def raises(completions, **columns):
    raise KeyError("score")

def text(completions, **columns):
    return "yes"

def two(completions, **columns):
    return [1.0, 2.0]

def wants_level(completions, level):
    return [float(level[0])]
"""
HAS_GGUF = importlib.util.find_spec("gguf") is not None
# Older versions of transformers are refused before the file's header is read.
READS_GGUF = HAS_GGUF and Version(version("transformers")) >= Version("5.18")
PRIOR = ("--prior_resampling.enabled", "true", "--prior_resampling.model")
TEACHER = ("--algorithm.distillation.teacher",)


def reward(name: str) -> tuple[str, str]:
    return "--reward.functions", f"[{name}]"


MESSAGES = ("--data.train", "messages.jsonl")
GPT2 = GPT2Config(vocab_size=284, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
MIXTRAL = MixtralConfig(
    vocab_size=284,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=2,
)
CASES = [
    Case("template", template("{% for m in messages %}{{ m."), "line 1 of its chat template: "),
    Case("template", template("{% if %}"), "line 1 of its chat template: ", "sample"),
    Case(
        "raises",
        template("{{ raise_exception('no such role') }}"),
        "none of the first 3 rows is usable: rows.jsonl:1: the chat template refuses it: no such",
    ),
    Case("raises", template("{{ a.b.c }}"), "rows.jsonl:1: the chat template refuses it:", "eval"),
    Case("raises", template("{{ a.b.c }}"), "--prompt: the chat template refuses it:", "sample"),
    Case(
        "system prompt",
        template(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{{ messages[0].content }}"
        ),
        "the chat template refuses it: no",
        more=("--data.system_prompt", "Be brief."),
    ),
    Case("no template", no_template, "the tokenizer has no chat template", more=MESSAGES),
    Case("no tokenizer", without("tokenizer.json"), "no tokenizer"),
    Case("broken tokenizer", text("tokenizer.json", "{"), "no tokenizer: "),
    Case("broken tokenizer", text("tokenizer_config.json", "{"), "no tokenizer: ", "eval"),
    Case("no end", setting("tokenizer_config.json", eos_token=None), "has no eos_token"),
    Case("config", text("config.json", "{"), "model.name model"),
    Case("config", text("config.json", "[]"), "model.name model", "eval"),
    Case("config", setting("config.json", hidden_size="wide"), "'wide' is no number", "sample"),
    Case("unknown type", setting("config.json", model_type="grokk"), "knows no model_type grokk"),
    Case("no type", setting("config.json", model_type=None), "its config.json names no model_type"),
    Case("soft caps", config(Gemma2Config()), "gemma2: soft-capped attention is not supported"),
    Case("soft caps", config(VaultGemmaConfig()), "vaultgemma: soft-capped attention is", "eval"),
    Case("layers", config(Qwen3NextConfig()), "layers of linear_attention are not", "sample"),
    Case(
        "quantised",
        setting("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised already (gptq)",
    ),
    Case("embedding", setting("config.json", vocab_size=200), "and the embedding 200 rows", "eval"),
    Case(
        "end token",
        setting("generation_config.json", eos_token_id=[1, 99_999]),
        "names the end token 99999",
    ),
    Case("a word", setting("generation_config.json", eos_token_id="<e>"), "'<e>' is no number"),
    Case("generation", text("generation_config.json", "{"), "generation_config.json: "),
    Case("positions", setting("config.json", max_position_embeddings=20), "than the 20 positions"),
    Case("no weights", without("model.safetensors"), "the folder holds no model.safetensors"),
    Case("a pickle", pickled, "pytorch_model.bin is a pickle", "eval"),
    Case("truncated", truncated, "model.safetensors is damaged: ", "sample"),
    Case("a shard lost", one_shard_lost, f"{SHARDS[1]} is missing, which {INDEX} names"),
    Case("another shard", one_shard_of_another_model, "does not hold model.norm.weight"),
    Case("an index", lambda f: (sharded(f), (f / INDEX).write_text("{}")), f"{INDEX}: ", "eval"),
    Case(
        "width", setting("config.json", hidden_size=32), "is [284, 64] in its files, and [284, 32]"
    ),
    Case("width", setting("config.json", hidden_size=32), "[284, 64] in its files", "dry-run"),
    Case("width", setting("config.json", hidden_size=32), "[284, 64] in its files", "doctor"),
    Case("width", setting("config.json", intermediate_size=96), "and [64, 96] by its", "eval"),
    Case("heads", setting("config.json", num_key_value_heads=4), "k_proj.weight is [", "sample"),
    Case(
        "layers", setting("config.json", num_hidden_layers=3), "lack 7 weights of its config.json"
    ),
    Case("layers", setting("config.json", num_hidden_layers=1), "config.json 1 layers"),
    Case(
        "another width in shards",
        lambda f: (sharded(f), setting("config.json", hidden_size=32)(f)),
        "[284, 64] in its files",
    ),
    Case("slow tokenizer", slow_tokenizer(truncated), "model.safetensors is damaged: "),
    Case("slow tokenizer", slow_tokenizer(template("{% if %}")), "line 1 of its chat template: "),
    Case(
        "slow tokenizer",
        slow_tokenizer(no_template),
        "tokenizer has no chat template",
        more=MESSAGES,
    ),
    Case("slow tokenizer", slow_tokenizer(without("merges.txt")), "no tokenizer: ", "sample"),
    Case("slow tokenizer", slow_tokenizer(text("vocab.json", "{")), "no tokenizer: ", "eval"),
    Case(
        "slow tokenizer",
        lambda f: (slow_tokenizer()(f), rewards(f)),
        "KeyError: 'score'",
        more=reward("rewards.py:raises"),
    ),
    Case("gpt2", family(GPT2, n_embd=32), "no weight in its files is [284, 32], as the embedding"),
    Case("gpt2", family(GPT2, n_layer=3), "hold 2 layers (transformer.h), and its config.json 3"),
    Case("gpt2", family(GPT2, n_layer=1), "hold 2 layers (transformer.h), and its config.json 1"),
    Case("mixtral", family(MIXTRAL, num_hidden_layers=3), "hold 2 layers (model.layers)", "eval"),
    Case("mixtral", family(MIXTRAL, hidden_size=32), "is [284, 32], as the embedding is", "doctor"),
    Case("prior", beside("prior", another_token), "different tokenizers", more=(*PRIOR, "prior")),
    Case("prior", nothing, "prior/config.json does not exist", more=(*PRIOR, "prior")),
    Case(
        "prior",
        beside("prior", without("model.safetensors")),
        "prior_resampling.model prior: the folder holds no model.safetensors",
        more=(*PRIOR, "prior"),
    ),
    Case(
        "prior",
        beside("prior", setting("generation_config.json", eos_token_id=[5])),
        "they end completions by different tokens",
        more=(*PRIOR, "prior"),
    ),
    Case("teacher", beside("t", another_token), "has another tokenizer", more=(*TEACHER, "./t")),
    Case("teacher", nothing, "teacher: ./t does not exist", more=(*TEACHER, "./t")),
    Case(
        "teacher",
        beside("t", setting("config.json", hidden_size=32)),
        "algorithm.distillation.teacher ./t: model.embed_tokens.weight is",
        more=(*TEACHER, "./t"),
    ),
    Case(
        "reward", rewards, "rewards.py:raises: KeyError: 'score'", more=reward("rewards.py:raises")
    ),
    Case("reward", rewards, "returned str instead of a list", more=reward("rewards.py:text")),
    Case("reward", rewards, "2 rewards for 1 completions", more=reward("rewards.py:two")),
    Case("reward", rewards, "the column 'level'", more=reward("rewards.py:wants_level")),
    Case("reward", rewards, "does not import: ModuleNotFound", more=reward("broken.py:found")),
    Case("reward", rewards, "KeyError: 'score'", "eval", ("--reward", "rewards.py:raises")),
    Case("reward", rewards, "KeyError: 'score'", "dry-run", reward("rewards.py:raises")),
    Case(
        "two files", lambda f: (gguf(b"GGUF")(f), gguf(b"")(f), (f / "n.gguf").touch()), "name one"
    ),
    Case(
        "gguf",
        gguf(b"GGML" + bytes(64)),
        "is no GGUF file" if HAS_GGUF else "pip install 'exgrpo-fast[train]' (gguf)",
    ),
    Case("template", template("{% if %}"), "line 1 of its chat template: ", "dry-run"),
    Case("deaf", template("{{ 'hello' }}"), "its chat template leaves out the question"),
    Case(
        "deaf",
        template("{{ messages[-1].content }}"),
        "its chat template leaves out data.system_prompt",
        "eval",
        ("--system-prompt", "Be brief."),
    ),
    Case("step", nothing, "--resume 5: expected auto, never or one of the", more=("--resume", "5")),
    Case(
        "targets", nothing, "has no layer c_attn", more=("--model.lora.targets", "[q_proj, c_attn]")
    ),
    Case("a list", text("generation_config.json", "[1]"), "generation_config.json: no object"),
    Case("no entries", text("generation_config.json", "[]"), "generation_config.json: no object"),
    Case("layers", setting("config.json", num_hidden_layers=-2), "num_hidden_layers -2 is no"),
    Case(
        "csv", nothing, "rows.csv does not exist; did you mean", more=("--data.train", "rows.csv")
    ),
    Case("endpoint", nothing, "--endpoint: the base URL", "eval", ("--endpoint", "nonsense")),
    Case(  # port 9 discards, where it is open at all
        "endpoint",
        nothing,
        "--endpoint: http://127.0.0.1:9/v1 takes no connection (Connection refused)",
        "eval",
        ("--endpoint", "http://127.0.0.1:9/v1"),
    ),
    Case("a blank", nothing, "give --prompt TEXT or --data FILE", "sample", ("--prompt", " ")),
    Case("no weights", without("model.safetensors"), "holds no model.safetensors", "doctor"),
    Case("hub", nothing, "nobody/none: config.json: ", more=("--model.name", "nobody/none")),
    Case("hub", nothing, "nobody/none: config.json: ", "eval", ("--model", "nobody/none")),
    Case("an adapter", text("adapter_config.json", "{}"), "merge it into its model first"),
]
LONG = ("--data.max_prompt_tokens", "4")
RESUME = ("--resume", "2")
REFUSE = ("--data.overlong_prompts", "refuse")
HELD_OUT = "all of its 3 questions are held out by data.eval"


def rows(*lines: Any, file: str = "rows.jsonl") -> Damage:
    """Writes these rows: dicts, or the text of a line."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return lambda folder: folder.with_name(file).write_text("\n".join(texts))


def checkpoint(damage: Damage) -> Damage:
    """One of step 2 in the run's folder, changed after it was written."""

    def make(folder: Path) -> None:
        path = folder.with_name("run") / "checkpoints" / "step_2"
        shutil.copytree(folder, path / "hf")
        write_manifest(path, 2, {})
        damage(path)

    return make


def asks(number: int, *, words: int = 0, answer: Any = "3") -> dict[str, Any]:
    return {"prompt": f"{number}" + " word" * words, "answer": answer}


CASES += [
    Case("long", nothing, "3 rows: 0 malformed, 3 longer than data.max_prompt_tokens 4", more=LONG),
    Case("long", nothing, "0 malformed, 3 longer than", "dry-run", LONG),
    Case("long", nothing, "rows.jsonl:1: the prompt has ", more=(*LONG, *REFUSE)),
    Case(
        "long",
        rows("{", *(asks(i, words=900) for i in range(99)), asks(99)),  # the first 100 rows of 101
        "rows.jsonl:2: the prompt has 4504 tokens",
        more=REFUSE,
    ),
    Case("resume", checkpoint(text("hf/config.json", "{}")), "config.json: damaged", more=RESUME),
    Case("resume", checkpoint(without("hf/config.json")), "config.json: missing", more=RESUME),
    Case("resume", checkpoint(text("hf/new", "")), "hf/new: not in the manifest", more=RESUME),
    Case("resume", checkpoint(text("MANIFEST.json", "{")), "missing or unreadable", more=RESUME),
    Case("resume", checkpoint(without("MANIFEST.json")), "missing or unreadable", more=RESUME),
    Case(
        "resume",
        checkpoint(setting("MANIFEST.json", schema=1)),
        "1, this version reads",
        more=RESUME,
    ),
    Case(
        "resume",
        checkpoint(lambda path: os.truncate(path / "hf" / "model.safetensors", 100)),
        "model.safetensors: damaged (size or checksum differs)",
        more=RESUME,
    ),
    Case("malformed", rows("{", asks(1), asks(2)), "1 of 3 rows are malformed"),
    Case("malformed", rows("{", asks(1), asks(2)), "1 of 3 rows are malformed", "eval"),
    Case("held out", nothing, HELD_OUT, more=("--data.eval", "rows.jsonl")),
    Case("gold", rows(asks(1), asks(2, answer="\\frac{")), "1 of 2 gold answers fail their own"),
    Case(
        "gold",
        rows(*(asks(i, answer="\\frac{") for i in range(200))),
        "20 of the first 20 gold answers fail their own reward",
    ),
]


def named(kind: str, architecture: str, **values: Any) -> Damage:
    """config.json of another architecture, beside the weights that are there."""
    found = {"model_type": kind, "architectures": [architecture], **values}
    return text("config.json", json.dumps(found))


def rope(**values: Any) -> Damage:
    return setting("config.json", rope_parameters={"rope_theta": 1e4, **values})


NO_HEAD = "transformers has no causal language model of type"
CASES += [
    Case("kind", named("vit", "ViTForImageClassification"), f"{NO_HEAD} vit"),
    Case("kind", named("clip", "CLIPModel"), f"{NO_HEAD} clip", "eval"),
    Case("kind", named("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"), f"{NO_HEAD} qwen2_5"),
    Case("kind", named("mpnet", "MPNetModel"), f"{NO_HEAD} mpnet", "sample"),
    Case(
        "kind", named("t5", "T5ForConditionalGeneration", is_encoder_decoder=True), f"{NO_HEAD} t5"
    ),
    Case(
        "kind",
        named("bart", "BartForConditionalGeneration", is_encoder_decoder=True),
        "bart is an encoder and a decoder",
    ),
    Case(
        "kind",
        named("whisper", "WhisperForConditionalGeneration", is_encoder_decoder=True),
        "whisper is an encoder and a decoder",
        "doctor",
    ),
    Case("kind", named("bert", "BertModel"), "bert is an encoder, no causal language model"),
    Case("kind", named("xlm-roberta", "XLMRobertaModel"), "xlm-roberta is an encoder"),
    Case("kind", setting("config.json", model_type=["qwen3"]), "knows no model_type ['qwen3']"),
    *(
        Case("head", setting("config.json", architectures=[name]), f"names {name}, a model with")
        for name in (
            "Qwen3ForSequenceClassification",
            "Qwen3ForTokenClassification",
            "Qwen3ForRewardModel",
            "LlamaForQuestionAnswering",
        )
    ),
    Case(
        "heads", setting("config.json", num_attention_heads=0), "num_attention_heads 0 is no number"
    ),
    Case("heads", setting("config.json", head_dim="64"), "head_dim '64' is no number", "eval"),
    Case("eps", setting("config.json", rms_norm_eps="1e-6"), "rms_norm_eps '1e-6' is no number"),
    Case("dropout", setting("config.json", attention_dropout="lots"), "'lots' is no number"),
    Case("dtype", setting("config.json", dtype="float7"), "dtype 'float7' is none of float32"),
    Case("dtype", setting("config.json", torch_dtype=16), "torch_dtype 16 is none of", "sample"),
    Case("rope", setting("config.json", rope_parameters=[1]), "rope_parameters [1] is no object"),
    Case(
        "rope", setting("config.json", rope_scaling={"type": "linear", "factor": "2"}), "factor '2'"
    ),
    Case("rope", rope(rope_type="linear"), "lacks factor"),
    Case("rope", rope(rope_type="longrope", factor=2.0), "lacks short_factor", "eval"),
    Case("rope", rope(rope_type="default", rope_theta=0), "has rope_theta 0, which is no positive"),
    Case(
        "quantised",
        setting("config.json", quantization_config="awq"),
        "quantised already (an unknown",
    ),
    Case("quantised", setting("config.json", quantization_config={}), "quantised already (an unkn"),
    *(
        Case(
            "end token",
            setting("generation_config.json", eos_token_id=id),
            f"{said!r} is no number",
        )
        for id, said in (([[1]], [1]), ({"a": 1}, {"a": 1}), (1.5, 1.5), (True, True), (["x"], "x"))
    ),
    Case("end token", setting("generation_config.json", eos_token_id=-1), "names the end token -1"),
    Case("padding", setting("generation_config.json", pad_token_id="x"), "pad_token_id 'x' is no"),
    Case("hub", nothing, "no folder, and no hub name: ", more=("--model.name", "Qwen/Qwen3 0.6B")),
    Case("hub", nothing, "no folder, and no hub name: ", "eval", ("--model", "hf:Qwen/Qwen3")),
]
if not torch.cuda.is_available():
    CUDA, FLASH = ("--device", "cuda"), ("--model.attention", "flash")
    NF4 = ("--model.quantization", "nf4", "--model.lora.rank", "4")
    CASES += [
        Case("device", nothing, "--device cuda: torch sees no CUDA device", more=CUDA),
        Case("device", nothing, "--device cuda: torch sees no CUDA device", "eval", CUDA),
        Case("device", nothing, "--device cuda: torch sees no CUDA device", "sample", CUDA),
        Case("device", nothing, "--device cuda: torch sees no CUDA device", "dry-run", CUDA),
        Case("attention", nothing, "model.attention flash needs a CUDA device", more=FLASH),
        Case("nf4", nothing, "model.quantization nf4 needs a CUDA device", more=NF4),
    ]
if READS_GGUF:
    CASES += [
        Case("gguf", gguf(gguf_header("llama")), "m.gguf is damaged: 126 bytes of 256"),
        Case("gguf", gguf(gguf_header("llama")[:40]), "its header cannot be read", "sample"),
        Case("gguf", gguf(gguf_header("grokk") + bytes(160)), "maps no GGUF file of arch", "eval"),
        Case("gguf", usable_gguf("{% if %}"), "line 1 of its chat template: "),
        Case("gguf", usable_gguf(), "the tokenizer has no chat template", more=MESSAGES),
        Case("gguf", usable_gguf("{{ a.b.c }}"), "the chat template refuses it:", "eval"),
        Case("gguf", usable_gguf(context_length=8), "are more than the 8 positions of model"),
        Case(
            "gguf",
            lambda f: (rewards(f), usable_gguf("{{ bos_token + messages[0].content }}")(f)),
            "KeyError: 'score'",
            more=reward("rewards.py:raises"),
        ),
    ]
if importlib.util.find_spec("reasoning_gym") is not None:
    QUICKSTART, GYM = ("--model.name", "quickstart"), "{gym: chain_sum, size: 4}"
    CASES += [
        Case(
            "gym", nothing, "did you mean 'chain_sum'?", more=("--data.train", "{gym: chain_sun}")
        ),
        Case("gym", nothing, "did you mean 'chain_sum'?", more=("--data.eval", "{gym: chain_sun}")),
        Case(
            "gym",
            rewards,
            "KeyError: 'score'",
            more=("--data.train", GYM, *reward("rewards.py:raises")),
        ),
        Case("quickstart", nothing, "data.train must be the gym task chain_sum", more=QUICKSTART),
        Case(
            "quickstart",
            rewards,
            "KeyError: 'score'",
            more=(*QUICKSTART, "--data.train", GYM, *reward("rewards.py:raises")),
        ),
    ]
PROGRAM = """
import json, os, sys, traceback
from transformers import GenerationConfig, PreTrainedTokenizerFast
loaded_by_transformers = "torch" in sys.modules  # as 5.17 does
from exgrpo_fast.build import before_torch
from exgrpo_fast.cli import main
for folder, words in json.load(sys.stdin):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.chdir(folder)
    sys.stderr = open("said", "w")
    code = None
    try:
        main(words)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        traceback.print_exc()
    has_torch = "torch" in sys.modules and not loaded_by_transformers
    json.dump([code, has_torch], open("ended", "w"))
    sys.stderr.flush()
    os._exit(0)
"""


def words_of(case: Case) -> list[str]:
    model, rows = ["--model", "model"], ["--data", "rows.jsonl"]
    tokens = ["--max-completion-tokens", "16", "--device", "cpu"]
    if case.command == "eval":
        return ["eval", *model, *rows, *tokens, *case.more]
    if case.command == "doctor":
        return ["doctor", *model]
    if case.command == "sample":
        return ["sample", *model, "--prompt", "1 + 2?", *tokens, *case.more]
    run = ["--out", "run", "--device", "cpu", "--no-supervise", "--data.train", "rows.jsonl"]
    sizes = ["--rollout.max_completion_tokens", "16", "--rollout.prompts_per_step", "2"]
    dry = ["--dry-run"] * (case.command == "dry-run")
    return ["train", "grpo", "--model.name", "model", *run, *sizes, *case.more, *dry]


@pytest.fixture(scope="module")
def outcomes(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Of all cases, in forks of an interpreter without torch."""
    calls = []
    for case in CASES:
        place = tmp_path_factory.mktemp("case")
        shutil.copytree(model_folder, place / "model")
        plain = [{"prompt": f"What is {i} + 2?", "answer": "3"} for i in range(3)]
        chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in plain]
        for name, lines in (("rows", plain), ("messages", chats)):
            (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        case.damage(place / "model")
        calls.append((str(place), words_of(case)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(calls),
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for place in (Path(folder) for folder, _ in calls):
        code, has_torch = json.loads((place / "ended").read_text())
        found.append(Outcome(code, has_torch, (place / "said").read_text()))
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n].name}")
def test_a_folder_that_cannot_be_used_is_said_in_one_line(
    number: int, outcomes: list[Outcome]
) -> None:
    found, case = outcomes[number], CASES[number]
    assert found.code == 2
    assert found.said.startswith("exgrpo-fast: ") and found.said.count("\n") == 1
    assert case.said in found.said
    assert not found.has_torch


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    hub = "http://127.0.0.1:9"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 2?", "answer": "3"}))
    words = words_of(Case("hub", lambda folder: None, "", more=("--model.name", "nobody/none")))
    done = subprocess.run(
        [sys.executable, "-m", "exgrpo_fast", *words],
        cwd=tmp_path,
        env=environment() | {"HF_ENDPOINT": hub},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"exgrpo-fast: model.name nobody/none: no folder of this name, and {hub} cannot be reached\n"
    )
