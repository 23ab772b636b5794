"""Config, tokenizer and generation settings of a model's folder.

Loading this module loads no torch, nor do `plain_config` and `plain_tokenizer`, which read the small
files as they are. `model_config` and `load_tokenizer` do: transformers' classes for a config need it.
A `name` is a folder or a hub name; `key` is the key of the config that gave it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import transformers  # whose own modules are loaded where they are used
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from transformers import GenerationConfig, PreTrainedTokenizerFast, logging
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line

CONFIG, GENERATION = "config.json", "generation_config.json"
# A transformers tokenizer. Its annotations admit far more types than a tokenizer returns.
Tokenizer = Any
_SIZES = {"vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"}
_HEADS = {"num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"}  # or lists
_REALS = (
    "_eps",
    "_epsilon",
    "dropout",
    "_pdrop",
    "rope_theta",
    "initializer_range",
)  # ends of keys
_DTYPES = {"auto", "float64", "float32", "float16", "bfloat16", "double", "float", "half"}
_ROPE_NUMBERS = {"factor", "rope_theta", "original_max_position_embeddings", "attention_factor"}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
HUB_SECONDS = 3  # until the hub has to answer
# Of tokenizers that have no tokens but those that the files name.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class PolicyError(UserError):
    """A model that this trainer cannot use, as one line to the user."""


def quiet_libraries() -> None:
    """No progress bars, advice and retries of transformers and the hub on the screen."""
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class ModelFiles(NamedTuple):
    """The small files of a model's folder or hub name."""

    name: str
    config: Any
    tokenizer: Tokenizer


def model_files(name: str, key: str = "model.name") -> ModelFiles:
    """As transformers reads them. PolicyError as `model_config` and `load_tokenizer`."""
    tokenizer = load_tokenizer(name, key)
    return ModelFiles(name, model_config(name, key), tokenizer)


def model_config(name: str, key: str = "model.name") -> Any:
    """PolicyError where the folder's config cannot be read."""
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PolicyError(f"{key} {name}: {first_line(error)}") from None


class PlainConfig(SimpleNamespace):
    """What config.json says, without the defaults of the model's class."""

    def get_text_config(self) -> PlainConfig:
        nested = getattr(self, "text_config", None)
        return PlainConfig(**nested) if isinstance(nested, dict) else self

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def plain_config(name: str, key: str = "model.name") -> PlainConfig:
    """PolicyError for a hub name that cannot be reached, for a file that is no JSON object, and for a
    size that is no number."""
    _refuse_unreachable_hub(name, key)
    try:
        found = PlainConfig(**json.loads(Path(str(cached_file(name, CONFIG))).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PolicyError(f"{key} {name}: {CONFIG}: {first_line(error)}") from None
    for size, value in vars(found.get_text_config()).items():
        if (why := _fault(size, value)) is not None:
            raise PolicyError(f"{key} {name}: {CONFIG}: {size} {value!r} {why}")
    return found


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with a value of config.json, whatever the family; its class says more, and needs
    torch."""
    if key in _SIZES and value is not None and not (type(value) is int and value > 0):
        return "is no number"
    if key in _HEADS and (isinstance(value, str) or isinstance(value, int | float) and value <= 0):
        return "is no number"
    if key.endswith(_REALS) and isinstance(value, str):
        return "is no number"
    if key in ("dtype", "torch_dtype") and value is not None:
        if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
            return "is none of float32, float16, bfloat16"
    if key in ("rope_parameters", "rope_scaling") and value is not None:
        return _rope_fault(value)
    return None


def _rope_fault(rope: Any) -> str | None:
    if not isinstance(rope, dict):
        return "is no object"
    for name, value in rope.items():
        if isinstance(value, dict):  # one for each type of layer
            if found := _rope_fault(value):
                return found
        elif name in _ROPE_NUMBERS and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or value <= 0:
                return f"has {name} {value!r}, which is no positive number"
    kind = rope.get("rope_type", rope.get("type"))
    needed = _ROPE_NEEDS.get(kind, ()) if isinstance(kind, str) else ()
    absent = [name for name in needed if name not in rope]
    return f"lacks {absent[0]}" if absent else None


def _refuse_unreachable_hub(name: str, key: str) -> None:
    """PolicyError where a name would have to come from a hub that does not answer: one try, where
    the download itself makes six in half a minute."""
    if Path(name).is_dir():
        return
    try:
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return
    except ValueError as error:
        raise PolicyError(
            f"{key} {name}: no folder, and no hub name: {first_line(error)}"
        ) from None
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=HUB_SECONDS)
    except (HfHubHTTPError, FileMetadataError, OfflineModeIsEnabled, ValueError):
        return  # an answer, none wanted, or no such name: transformers has the words
    except Exception:  # of the HTTP client, which differs between versions
        raise PolicyError(
            f"{key} {name}: no folder of this name, and {constants.ENDPOINT} cannot be reached"
        ) from None


def load_tokenizer(name: str, key: str = "model.name") -> Tokenizer:
    """PolicyError when the tokenizer has no end-of-sequence token: nothing could ever stop."""
    if Path(name).is_absolute() and not Path(name).exists():
        raise PolicyError(f"{key}: {name} does not exist")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the Rust reader of tokenizer.json raises nothing narrower
        raise PolicyError(f"{key} {name}: no tokenizer: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise PolicyError(_endless(f"{key} {name}"))
    return tokenizer


def plain_tokenizer(name: str, key: str = "model.name") -> Tokenizer | None:
    """What the tokenizer's files, tokenizer_config.json and the chat template say.

    None where neither tokenizer.json nor the class that tokenizer_config.json names tells how to read
    them, and where the end token may come from another class. PolicyError for files that cannot be
    read, and as `load_tokenizer`.
    """
    if not has_file(name, "tokenizer_config.json"):
        return None
    try:
        settings = json.loads(Path(str(cached_file(name, "tokenizer_config.json"))).read_text())
        named = settings.get("tokenizer_class")
        classes = [PreTrainedTokenizerFast] * has_file(name, "tokenizer.json")
        if named not in _PLAIN_CLASSES:  # its own end token, and files of other names
            classes += filter(None, [getattr(transformers, str(named), None)])
        for kind in classes:
            tokenizer = kind.from_pretrained(name, trust_remote_code=False)
            if tokenizer.eos_token_id is not None:
                return tokenizer
    except Exception as error:
        raise PolicyError(f"{key} {name}: no tokenizer: {first_line(error)}") from None
    if classes and named in _PLAIN_CLASSES:
        raise PolicyError(_endless(f"{key} {name}"))
    return None


class TemplateAlone:
    """A chat template whose tokenizer is not read yet: it makes the texts, and no ids of them."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def __call__(self, texts: Sequence[str], **options: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[] for _ in texts]}

    def apply_chat_template(
        self, conversation: list[Any], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any:
        """A text of each conversation, or of the only one, without the special tokens by name."""
        is_one = isinstance(conversation[0], dict)
        texts, _ = render_jinja_template(
            [conversation] if is_one else conversation,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), ""),
        )
        return texts[0] if is_one else texts


def has_file(name: str, file: str) -> bool:
    try:
        return cached_file(name, file) is not None
    except OSError:
        return False


def _endless(subject: str) -> str:
    return f"{subject}: its tokenizer has no eos_token; set one and save it"


def end_of_sequence_ids(generation: GenerationConfig | None, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's own end token first, then those of the model's generation config."""
    listed: Any = generation.eos_token_id if generation else None
    others = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(e for e in [tokenizer.eos_token_id, *others] if e is not None))


def make_decode(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Token ids -> the text as the policy wrote it, without the end and padding tokens behind it.

    Other special tokens stay: in many models `<think>`, or the tags of an answer, are some.
    """
    ends = {*end_of_sequence_ids(read_generation_config(tokenizer.name_or_path), tokenizer)}
    ends.add(tokenizer.pad_token_id)

    def decode(ids: Sequence[int]) -> str:
        end = len(ids)
        while end and ids[end - 1] in ends:
            end -= 1
        return str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))

    return decode


def make_encode(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_generation_config(name: str) -> GenerationConfig | None:
    """Of a folder or hub name; None where there is none. PolicyError for a file that is no JSON.

    Settings that contradict each other (greedy decoding with a temperature, say) are none that a run
    follows, but transformers reads or saves no file with them. Then those of sampling are kept, or,
    where even these do not go together, the token ids alone.
    """
    values = generation_settings(name)
    if not values:
        return None
    for change in ({}, {"do_sample": True, "num_return_sequences": 1, "num_beams": 1}):
        try:
            found = GenerationConfig.from_pretrained(name, trust_remote_code=False, **change)
            found.validate(strict=True)
            return found
        except (TypeError, ValueError):
            pass
    return GenerationConfig(**{k: value for k, value in values.items() if k.endswith("_token_id")})


def generation_settings(name: str) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none."""
    try:
        path = cached_file(name, GENERATION)
        settings = json.loads(Path(path).read_text()) if path else {}
    except OSError:
        return {}
    except ValueError as error:
        raise PolicyError(f"model.name {name}: {GENERATION}: {error}") from None
    if not isinstance(settings, dict):
        raise PolicyError(f"model.name {name}: {GENERATION}: no object, but {settings!r:.40}")
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = settings.get(key)
        for id in value if isinstance(value, list) and key == "eos_token_id" else [value]:
            if id is not None and type(id) is not int:
                raise PolicyError(f"model.name {name}: {GENERATION}: {key} {id!r} is no number")
    return settings
