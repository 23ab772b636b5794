"""What the files of a model's folder say beside its weights, read before those are loaded.

Three things can follow from a setting: it is taken (end tokens), it is overridden and named in one
line (sampling defaults, dropout, `use_cache`), or the folder is refused (quantised weights, too few
positions, a tokenizer that is larger than the embedding). Loads no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import transformers
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

from exgrpo_fast.model.folder_reading import GENERATION, PolicyError, generation_settings

QUESTION = {"role": "user", "content": "6 x 7?"}
# Rotary embeddings whose frequencies follow the longest sequence that is read with them.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Of a generation config: what changes which tokens are drawn, with the values that change nothing.
SAMPLING: dict[str, Any] = {
    "do_sample": (False, True),
    "temperature": (1.0,),
    "top_k": (0, 50),  # 50 is the default of transformers
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_length": (20,),
    "max_new_tokens": (),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": (),
}


class Positions(NamedTuple):
    """Tokens that a sequence may have."""

    limit: int
    why: str
    is_rotary: bool  # beyond it a forward pass is possible, if not what the model was trained for
    binds: bool  # beyond it a pass over several sequences fails, or is another model's


# --- positions ------------------------------------------------------------------------------------


def positions(config: Any) -> Positions | None:
    """What a transformers config allows; None for a model without such a limit (ALiBi, Mamba).

    Rotary embeddings of type dynamic or longrope change all frequencies with the longest sequence
    of a pass: within a pack one completion would change its neighbours, and while one is generated
    its own past. Up to the length of the pre-training they do not.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    # A config.json as older releases wrote it has the other two in place of rope_parameters.
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not parameters and getattr(config, "rope_theta", None) is not None:
        parameters = {"rope_theta": config.rope_theta}
    ropes = list(_ropes(parameters))
    for rope in ropes:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if any(name in kind for name in LENGTH_DEPENDENT):
            limit = int(rope.get("original_max_position_embeddings") or most)
            why = f"beyond that, rotary embeddings of type {kind} follow the longest sequence"
            return Positions(min(limit, most), why, is_rotary=True, binds=True)
    return Positions(int(most), "max_position_embeddings", is_rotary=bool(ropes), binds=not ropes)


def _ropes(parameters: Any) -> Iterable[Mapping[str, Any]]:
    """One for all layers, or one for each type of layer."""
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


# --- refused --------------------------------------------------------------------------------------


_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}  # others read past a sequence's end


def refuse_unknown_type(config: Any, subject: str) -> None:
    """PolicyError for a type of model that the installed transformers does not know, and for one without
    a language-model head, as far as its small files say so."""
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise PolicyError(f"{subject}: its config.json names no model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise PolicyError(
            f"{subject}: transformers {transformers.__version__} knows no model_type "
            f"{kind} (config.json)"
        )
    if (known := causal_types()) and kind not in known:
        raise PolicyError(f"{subject}: transformers has no causal language model of type {kind}")
    if getattr(config, "is_encoder_decoder", None) is True:
        raise PolicyError(
            f"{subject}: {kind} is an encoder and a decoder, no causal language model"
        )
    if kind in ENCODERS and getattr(config, "is_decoder", None) is not True:
        raise PolicyError(f"{subject}: {kind} is an encoder, no causal language model")
    names = getattr(config, "architectures", None) or []
    for name in [names] if isinstance(names, str) else names:
        if _OTHER_HEAD.search(str(name)):
            raise PolicyError(
                f"{subject}: its config.json names {name}, a model with another head than that of a "
                f"causal language model"
            )


# Types of which transformers has a causal language model, and whose checkpoints attend to both sides.
ENCODERS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_OTHER_HEAD = re.compile(
    r"For(?!CausalLM|ConditionalGeneration)\w*(?:Classification|Answering|Choice|MaskedLM|Reward)"
    r"|RewardModel|ForScore|ForEmbedding"
)


def causal_types() -> set[str]:
    """Types of which transformers has a causal language model, read from its source, whose import loads
    torch; empty where the source is another."""
    source = Path(transformers.__file__).parent / "models" / "auto" / "modeling_auto.py"
    try:
        _, _, rest = source.read_text().partition(
            "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict("
        )
    except OSError:
        return set()
    return set(re.findall(r'\("([\w-]+)",', rest[: rest.find("\n)\n")]))


def refuse_other_kinds(config: Any, name: str) -> None:
    """PolicyError for a model that transformers has no causal language model of."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PolicyError(
            f"model.name {name}: transformers has no causal language model of type "
            f"{config.model_type}"
        )


def refuse_unsupported(config: Any) -> None:
    """PolicyError for a model whose log-probs the passes over packs would get wrong."""
    text, family = config.get_text_config(), config.model_type
    if getattr(text, "attn_logit_softcapping", None):
        raise PolicyError(f"{family}: soft-capped attention is not supported")
    for kind in sorted(set(getattr(text, "layer_types", None) or ()) - _KINDS_OF_LAYERS):
        raise PolicyError(f"{family}: layers of {kind} are not supported")


def logit_scale(config: Any) -> float:
    """What the model multiplies its logits by, or, which is the same, the states before the head."""
    text = config.get_text_config()
    factors = [getattr(text, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(text, "logits_scaling", None)
    if divisor is not None:  # Granite, MiniCPM; a factor in HyperCLOVA X alone
        factors.append(divisor if text.model_type == "hyperclovax" else 1.0 / divisor)
    return math.prod(float(factor) for factor in factors if factor is not None)


def refuse_broken_template(tokenizer: Any, name: str, *, system_prompt: str | None = None) -> None:
    """PolicyError for a chat template that is no Jinja, and for one that leaves out the question or
    the system prompt. One that raises may only refuse some conversations: reading the data shows it."""
    if not getattr(tokenizer, "chat_template", None):
        return

    def is_left_out(role: str, text: str, *others: dict[str, str]) -> bool:
        one, other = (
            tokenizer.apply_chat_template([{"role": role, "content": t}, *others], tokenize=False)
            for t in (text, f"{text} Or not?")
        )
        return one == other

    left_out = None
    try:
        if is_left_out("user", QUESTION["content"]):
            left_out = "the question"
        elif system_prompt and is_left_out("system", system_prompt, QUESTION):
            left_out = "data.system_prompt"
    except jinja2.TemplateSyntaxError as error:
        raise PolicyError(
            f"model.name {name}: line {error.lineno} of its chat template: {error.message}"
        ) from None
    except Exception:
        return
    if left_out is not None:
        raise PolicyError(f"model.name {name}: its chat template leaves out {left_out}")


def refuse_quantised(config: Any, name: str) -> None:
    """PolicyError for weights that are quantised in the files, of any kind (bnb, GPTQ, AWQ, fp8)."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    values = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
    kind = values.get("quant_method") or "an unknown method"
    raise PolicyError(
        f"model.name {name}: its weights are quantised already ({getattr(kind, 'value', kind)}), and "
        f"cannot be trained or merged; take the folder of the plain weights "
        f"(model.quantization nf4 quantises them while they load)"
    )


def refuse_small_embedding(config: Any, tokenizer: Any, name: str) -> None:
    """PolicyError where the tokenizer can make an id that the embedding has no row for.

    Special tokens that no text of ours contains, such as those of images, may lie beyond.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is None:
        return
    special = set(getattr(tokenizer, "all_special_ids", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special |= {id for id, token in added.items() if getattr(token, "special", False)}
    own = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    beyond = [id for id in tokenizer.get_vocab().values() if id >= rows]
    used = [id for id in beyond if id not in special or id in own]
    if used:
        raise PolicyError(
            f"model.name {name}: the tokenizer has {len(tokenizer)} tokens (ids up to "
            f"{max(used)}), and the embedding {rows} rows; resize the model's embedding or take the "
            f"tokenizer that belongs to it"
        )


def refuse_foreign_end_tokens(config: Any, eos_token_ids: Iterable[int], name: str) -> None:
    """PolicyError for an end token that the embedding has no row for: it could never be drawn."""
    rows, ids = getattr(config, "vocab_size", None), list(eos_token_ids)
    if beyond := [id for id in ids if id < 0 or (rows is not None and id >= rows)]:
        raise PolicyError(
            f"model.name {name}: {GENERATION} names the end token {beyond[0]}, and the embedding has "
            f"{rows} rows"
        )


# --- overridden -----------------------------------------------------------------------------------


def overridden_settings(config: Any, name: str, *, dropout: bool) -> list[str]:
    """Settings of the folder that a run does not follow, each as `key value`.

    `dropout`: whether the update follows that of the config, and its noise of routers.
    """
    values = generation_settings(name)
    found = [
        f"{key} {values[key]}"
        for key, neutral in SAMPLING.items()
        if values.get(key) is not None and values[key] not in neutral
    ]
    if getattr(config, "use_cache", True) is False:
        found.append("use_cache False")
    if not dropout:
        found += [
            f"{key} {value}"
            for key, value in config.to_dict().items()
            if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0.0
        ]
    return found


# --- end of a turn --------------------------------------------------------------------------------


def unlisted_turn_end(tokenizer: Any, eos_token_ids: Iterable[int]) -> str | None:
    """The token with which the chat template ends an answer, where it is no end token; else None.

    A model that learnt the template ends its answers with it, and would go on behind it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "42"
    turns = [QUESTION, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program; data loading says what it refuses
        return None
    behind = text[text.rfind(answer) + len(answer) :]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    special |= set(getattr(tokenizer, "added_tokens_decoder", {}))
    if not ids or ids[0] not in special or ids[0] in set(eos_token_ids):
        return None
    return str(tokenizer.convert_ids_to_tokens(ids[0]))
