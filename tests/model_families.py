"""Tiny random models of the families of transformers, each compared with the plain model.

`python tests/model_families.py` prints the families of docs/models.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.lora import add_adapter, random_adapter, save_plain
from exgrpo_fast.model.policy import Policy, inference
from exgrpo_fast.rollout.forward_check import ForwardMismatch, check_forward
from exgrpo_fast.rollout.hf.engine import TransformersEngine

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
FAMILIES_OF_PAGE = PAGE[PAGE.index("\nPassing: ") :]
PASSING = re.findall(r"[a-z0-9_-]+", FAMILIES_OF_PAGE.partition("\n\n")[0].partition(":")[2])
REFUSED = dict(re.findall(r"^\| ([a-z0-9_-]+) \| (.*) \|$", FAMILIES_OF_PAGE, re.M))
# What the page says of each family: "" where it passes, or why it is refused.
ROWS = dict.fromkeys(PASSING, "") | {k: v for k, v in REFUSED.items() if k != "refused"}
PROMPT, EOS, LARGEST = tuple(range(3, 40)), 2, 5_000_000
# As far as a family's config knows the key; None leaves it out.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], 96),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size"], 64),
    **dict.fromkeys(["word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"], 96),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(
        ["num_attention_heads", "attention_heads", "num_heads", "n_head", "n_heads"], 4
    ),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 512),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["state_size", "mamba_d_state", "sliding_window"], 8),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_MLA: dict[str, Any] = {"head_dim": None, "num_key_value_heads": 4}
_DECODER: dict[str, Any] = {
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **{"decoder_layers": 2, "encoder_layers": 1, "max_target_positions": 256},
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in """afmoe apertus apertus1p5_text arcee aria_text axk2 bailing_hybrid bamba beam biogpt bitnet bloom
codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v32 deepseek_v4 diffllama doge ernie4_5
ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 falcon_mamba flex_olmo flint gemma gemma2
gemma3_text glm glm4 glm4_moe glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss
gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
hrm_text hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe
kimi_linear kolibri1 laguna lara_mini lfm2 lfm3 llama llama4_text mamba mellum mimo_v2_flash
minimax minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral modernbert-decoder mpt
nanochat nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe
qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text
recurrent_gemma rwkv sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm""".split()
    },
    **{
        name: {"is_decoder": True}
        for name in """bert bert-generation big_bird camembert data2vec-text electra ernie
megatron-bert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl""".split()
    },
    **{
        name: _DECODER
        for name in "bart blenderbot marian mbart mvp pegasus plbart trocr whisper".split()
    },
    "axk1": _MLA,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 100.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MLA | {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "falcon": {"head_dim": None, "num_kv_heads": 4},
    "gemma3n_text": {
        **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank"], 8),
        **{"vocab_size_per_layer_input": 96, "intermediate_size": 96, "altup_num_inputs": 2},
        **{"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe_lite": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "dots1": {
        **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"], 1),
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
    "granite": {"logits_scaling": 8.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.25},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "minicpm3": _MLA,
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2_moe": {"sliding_window": None},
    "youtu": _MLA,
}


def tiny_config(family: str) -> PreTrainedConfig:
    """2 layers, width 64."""
    kind = CONFIG_MAPPING[family]
    usual, renamed = kind(), getattr(kind, "attribute_map", {})
    known = {k: v for k, v in SMALL.items() if k not in renamed and hasattr(usual, k)}
    tokens = {"pad_token_id", "bos_token_id", "eos_token_id"}
    known = {k: v for k, v in known.items() if k in tokens or getattr(usual, k) is not None}
    values = {k: v for k, v in (known | FAMILIES[family]).items() if v is not None}
    return kind(**values)


def shell_of(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tiny(family: str) -> PreTrainedModel:
    """Weights as large as after training, so that attention has a say."""
    config = tiny_config(family)
    shell = shell_of(config)
    assert shell.num_parameters() < LARGEST, f"{family}: {shell.num_parameters()} parameters"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.uniform_(-1.0, 2.0)
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def outcome(family: str) -> str:
    """Empty where the family passes, else why it is refused: the words of the check, without numbers."""
    try:
        for adapter in (False, True):
            model = tiny(family)
            if adapter:
                add_adapter(model, rank=4, alpha=8.0)
            policy = Policy(model)
            engine = TransformersEngine(policy, eos_token_ids=[EOS], pad_token_id=0)
            check_forward(policy, engine, prompt_ids=PROMPT, eos_token_ids=[EOS])
        gap = reloaded_gap(policy)
        return "" if gap < 1e-4 else f"checkpoint: reloaded, it differs by {gap:.0e}"
    except ForwardMismatch as error:
        what = str(error).partition(f"({error.part}: ")[2].removesuffix(")")
        for kept in (
            "its attention cannot be replaced",
            "its own code fails",
            "log-probs differ",
            "it draws random numbers",
        ):
            what = kept if what.startswith(kept) else what
        return f"{error.part}: {what}"
    except UserError as error:
        return str(error).removeprefix(family + ": ")


def reloaded_gap(policy: Policy) -> float:
    """Largest difference of logits between a model with an adapter and its saved, reloaded self."""
    model: Any = policy.model
    ids = torch.tensor([PROMPT])
    with random_adapter(model), inference(model), policy.as_loaded(), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with tempfile.TemporaryDirectory() as folder:
            save_plain(model, Path(folder))
            saved: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = saved(input_ids=ids, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = {family: outcome(family) for family in sys.argv[1:] or sorted(FAMILIES)}
    print(f"Passing: {', '.join(family for family, why in outcomes.items() if not why)}.\n")
    print("| refused | part of the check: why |\n|---|---|")
    for family, why in outcomes.items():
        if why:
            print(f"| {family} | {why} |")
