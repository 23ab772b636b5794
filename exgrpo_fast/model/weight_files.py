"""The files of a folder's weights, checked by their names and headers. Loads no torch.

Which weights a model has only its class says: `load_model` compares them. Of every family the config
says the shape of the embedding and the number of layers before, of those in `LLAMA_LIKE` most shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from exgrpo_fast.model.folder_reading import PolicyError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Shapes = Mapping[str, Sequence[int]]  # by the name of the weight


# --- what the files hold --------------------------------------------------------------------------


def read_shapes(name: str, key: str = "model.name") -> Shapes:
    """Of the weights of a folder; none for a hub name, as a hub checks what it sends.

    PolicyError for a folder without safetensors, with a part of them, or with a cut one.
    """
    folder, subject = Path(name), f"{key} {name}"
    if not folder.is_dir():
        return {}
    if (folder / SINGLE).exists():
        return _shapes_in(folder / SINGLE, subject)
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise PolicyError(f"{subject}: the folder holds no {SINGLE}{hint}")
    shapes: dict[str, Sequence[int]] = {}
    for file, weights in _files_of(folder, subject).items():
        if not (folder / file).exists():
            raise PolicyError(f"{subject}: {file} is missing, which {INDEX} names")
        found = _shapes_in(folder / file, subject)
        if absent := sorted(weights - found.keys()):
            raise PolicyError(f"{subject}: {file} does not hold {absent[0]}, as {INDEX} says")
        shapes |= found
    return shapes


def _shapes_in(file: Path, subject: str) -> Shapes:
    """Opening a file compares its length with its header."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return {weight: opened.get_slice(weight).get_shape() for weight in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{subject}: {file.name} is damaged: {error}") from None


def _files_of(folder: Path, subject: str) -> dict[str, set[str]]:
    """File -> the weights that it should hold, as the index says."""
    try:
        index = json.loads((folder / INDEX).read_text())
        weight_map: Mapping[str, str] = index["weight_map"]
        files: dict[str, set[str]] = {}
        for weight, file in weight_map.items():
            files.setdefault(file, set()).add(weight)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{subject}: {INDEX}: {error!r}") from None
    return files


# --- what the config says -------------------------------------------------------------------------

# Decoders whose weights have the names and shapes of Llama's, whatever else they have.
LLAMA_LIKE = {
    "ernie4_5", "exaone4", "gemma", "gemma3_text", "granite", "llama",
    "mistral", "olmo2", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3",
}  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"
# That older releases have saved; they are made anew.
_BUFFERS = ("inv_freq", "attn.bias", "attention.bias", "masked_bias")
_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # the names of a stack of layers and of one in it
# What families call these sizes in their config.json.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def refuse_other_shapes(config: Any, shapes: Shapes, subject: str) -> None:
    """PolicyError where a config and the shapes of the files are of different models, as far as both
    are known before the model's class is loaded."""
    expected = llama_shapes(config)
    if not expected.keys() & shapes.keys():  # of another family, or under other names
        if not getattr(config, "quantization_config", None):
            refuse_other_sizes(config.get_text_config(), shapes, subject)
        return
    mismatched = [
        (weight, shapes[weight], shape)
        for weight, shape in expected.items()
        if weight in shapes and list(shapes[weight]) != shape
    ]
    refuse_other_weights(
        expected,
        subject,
        mismatched=mismatched,
        missing=expected.keys() - shapes.keys() - {EMBEDDING},  # may be saved as the head
        unexpected=shapes.keys() - expected.keys(),
    )


def refuse_missing_layers(config: Any, shapes: Shapes, targets: Iterable[str]) -> None:
    """PolicyError for an adapter on layers that a decoder with Llama's names does not have."""
    if config.model_type not in LLAMA_LIKE or not shapes:
        return
    layers = [weight.removesuffix(".weight") for weight in shapes]
    for target in targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            raise PolicyError(f"model.lora.targets: {config.model_type} has no layer {target}")


def refuse_other_sizes(config: Any, shapes: Shapes, subject: str) -> None:
    """PolicyError where no weight has the shape of the config's embedding, or the only stack of layers
    has another number of them; whatever the family and its names."""
    rows, width, depth = (
        next(filter(None, (_number(config, key) for key in keys)), None)
        for keys in (("vocab_size",), _WIDTHS, _DEPTHS)
    )
    if shapes and rows and width and [rows, width] not in map(list, shapes.values()):
        raise PolicyError(
            f"{subject}: no weight in its files is {[rows, width]}, as the embedding is by its "
            f"config.json"
        )
    layers: dict[str, set[int]] = {}
    for stack, number in (found.groups() for name in shapes if (found := _LAYER.match(name))):
        layers.setdefault(stack, set()).add(int(number))
    if len(layers) != 1 or not depth:  # a vision encoder has its own layers
        return
    ((stack, found),) = layers.items()
    # Layers that predict further tokens lie behind the others; transformers leaves them out.
    ignored = _number(config, "num_nextn_predict_layers") or 0
    if not depth <= len(found) <= depth + ignored:
        raise PolicyError(
            f"{subject}: its files hold {len(found)} layers ({stack}), and its config.json {depth}"
        )


def llama_shapes(config: Any) -> dict[str, list[int]]:
    """Of the weights that the config, read as it is, leaves no doubt about; none of other families."""
    if config.model_type not in LLAMA_LIKE or getattr(config, "quantization_config", None):
        return {}
    rows, width, inner, layers, heads, pairs, head = (
        _number(config, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    queries, keys = (head and count and head * count for count in (heads, pairs))
    of_layer = {
        "self_attn.q_proj": [queries, width],
        "self_attn.k_proj": [keys, width],
        "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, queries],
        "mlp.gate_proj": [inner, width],
        "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner],
    }
    shapes = {EMBEDDING: [rows, width], "model.norm.weight": [width]}
    for layer in range(layers or 0):
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in of_layer.items()}
    return {name: [size for size in s if size] for name, s in shapes.items() if all(s)}


def _number(config: Any, key: str) -> int | None:
    """None: the class has a default for it, or one for each layer."""
    value = getattr(config, key, None)
    return value if isinstance(value, int) else None


def refuse_other_weights(
    own: Iterable[str],
    subject: str,
    *,
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """PolicyError where the files are not those of the config: transformers gives random values to
    what they lack, and drops layers beyond the config's number.

    own: names of the model's weights. mismatched: name, shape in the files, shape by the config.
    """
    for weight, found, expected in sorted(mismatched):
        raise PolicyError(
            f"{subject}: {weight} is {list(found)} in its files, and {list(expected)} by its "
            f"config.json"
        )
    if absent := sorted(missing):
        raise PolicyError(
            f"{subject}: its files lack {len(absent)} weights of its config.json, such as {absent[0]}"
        )
    layers: dict[str, set[str]] = {}
    for stack, number in (found.groups() for weight in own if (found := _LAYER.match(weight))):
        layers.setdefault(stack, set()).add(number)
    for weight in sorted(unexpected):
        found = _LAYER.match(weight)
        if found and found[2] not in layers.get(found[1], {found[2]}):
            raise PolicyError(
                f"{subject}: its files hold {weight}, and its config.json "
                f"{len(layers[found[1]])} layers"
            )


def refuse_dropped_weights(own: Iterable[str], unexpected: Iterable[str], subject: str) -> None:
    """PolicyError where the files hold a weight of a layer or module that the config's model has, and
    which it leaves out: a bias, or the norm of queries.

    What stands beside the model, such as a head of values or an encoder of images, is of no account.
    """
    own = set(own)
    modules = {name.rpartition(".")[0] for name in own}
    layers = {found[0] for name in own if (found := _LAYER.match(name))}
    for weight in sorted(unexpected):
        found = _LAYER.match(weight)
        is_of_model = weight.rpartition(".")[0] in modules or (found and found[0] in layers)
        if is_of_model and not weight.endswith(_BUFFERS):
            raise PolicyError(
                f"{subject}: its files hold {weight}, and the model of its config.json has no such "
                f"weight"
            )
