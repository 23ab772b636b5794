"""YAML, recipes and the command line -> a checked Config, or one line that says why not."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from exgrpo_fast.config.hints import RENAMED, hint
from exgrpo_fast.config.schema import Config
from exgrpo_fast.config.sections import ConfigError, Section


def recipe_names() -> list[str]:
    folder = resources.files("exgrpo_fast.config") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith("yaml"))


def load_config(source: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """A recipe's name or a YAML file, with dotted overrides on top -> a checked Config."""
    tree = read_recipe(source)
    for dotted, text in overrides:
        assign(tree, dotted, _override(dotted, text))
    return validate(tree)


def read_recipe(source: str) -> dict[str, Any]:
    """A recipe's name or a YAML file -> its tree of values, unchecked."""
    return read_yaml(*_find(source))


def validate(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree of values; ConfigError with one line on the first mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(format_validation_error(error)) from None


# What does not change what a run has learned so far, nor what its next step would be.
MAY_CHANGE = (
    "model.gradient_checkpointing model.offload_activations model.tile_tokens data.check_answers "
    "reward.workers reward.timeout_seconds rollout.engine rollout.max_batch_sequences "
    "rollout.kv_cache_gib rollout.sleep rollout.sync_tolerance rollout.server replay.enabled "
    "train.max_steps train.max_tokens_per_microbatch train.gradient_release train.preflight "
    "train.allow_mismatch eval checkpoint log"
).split()


def refuse_other_config(saved: Path, config: Config) -> None:
    """ConfigError when a run is resumed with other keys than it was started with.

    `saved`: the config.yaml of its folder, maybe of an earlier version: keys that only one of the
    two has are left aside.
    """
    if not saved.exists():
        return
    tree = read_yaml(*_find(str(saved)))
    for old, new in RENAMED.items():
        if _has(tree, old):
            raise ConfigError(f"--resume: {saved}: {old} is now {new}; rename it in that file")
    differences = _differences(tree, config)
    if differences:
        raise ConfigError(
            f"--resume: {saved} says {'; '.join(differences)}. Only {', '.join(MAY_CHANGE)} may "
            f"change; to go on with other values all the same, change them in that file too"
        )


def _has(tree: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _differences(saved: Mapping[str, Any], section: Section, prefix: str = "") -> list[str]:
    found: list[str] = []
    now = section.model_dump(mode="json")
    for name in saved.keys() & now.keys():
        key, value, inner = f"{prefix}{name}", saved[name], getattr(section, name)
        if key in MAY_CHANGE:
            continue
        if isinstance(inner, Section) and isinstance(value, Mapping):
            found += _differences(value, inner, f"{key}.")
        elif value != now[name]:
            found.append(f"{key} {value!r}, now {now[name]!r}")
    return sorted(found)


def require(value: Any, key: str, what: str) -> Any:
    if value is None:
        raise ConfigError(f"{key} is not set: give {what}, in the config or as --{key} VALUE")
    return value


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(source: str) -> tuple[str, str]:
    """(text, name) of a recipe or a file."""
    if source in recipe_names():
        recipes = resources.files("exgrpo_fast.config") / "recipes"
        return (recipes / f"{source}.yaml").read_text(), source
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        try:
            return path.read_text(encoding="utf-8"), source
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"config file {source}: {why}") from None
    raise ConfigError(
        f"unknown recipe '{source}'{suggest(source, recipe_names())}; "
        f"recipes: {', '.join(recipe_names())}; or give a .yaml file"
    )


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys (YAML itself keeps the last one in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"line {line}: the key '{key}' occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, name: str) -> dict[str, Any]:
    tree = _load_yaml(text, f"config {name}")
    if not isinstance(tree, dict):
        raise ConfigError(f"config {name}: expected 'key: value' lines, got {type(tree).__name__}")
    return tree


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 13th month
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def _override(dotted: str, text: str) -> Any:
    """The value of an option: YAML, but the text itself where only a text can be meant.

    YAML would end the text 'answer after #### ' at its first ' #'.
    """
    is_plain = text.strip() not in {"", "~", "null"} and text.strip()[0] not in "\"'"
    if is_plain and _annotation(dotted.replace("-", "_").split(".")) in (str, str | None):
        return text
    return _load_yaml(text, f"--{dotted}")


def _annotation(path: Sequence[str]) -> Any:
    """The type of a dotted key; None where there is no such key."""
    section: type[BaseModel] | None = Config
    annotation: Any = None
    for name in path:
        info = section.model_fields.get(name) if section else None
        if info is None:
            return None
        annotation = info.annotation
        section = section_of(annotation)
    return annotation


def from_dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """{'train.lr': 1e-6} -> {'train': {'lr': 1e-6}}"""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        assign(tree, dotted, value)
    return tree


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values of some dotted keys; ConfigError where they do not fit."""
    tree = config.model_dump(mode="json")
    for dotted, value in values.items():
        assign(tree, dotted, value)
    return validate(tree)


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.replace("-", "_").split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            # `--data.train.gym chain_sum` over a file name: the branch replaces the leaf.
            branch = tree[parent] = {}
        tree = branch
    tree[leaf] = value


# --- one line for every mistake -------------------------------------------------------------------


def format_validation_error(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    # Unknown keys first; of a union's complaints the one that looked deepest.
    first = max(details, key=lambda d: (d["type"] == "extra_forbidden", len(d["loc"])))
    path = [str(part) for part in first["loc"] if str(part) not in _UNION_TAGS]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        for inner in paths_below(first["input"], path):  # of another trainer's section, its keys
            if found := hint(inner):
                return f"unknown key '{'.'.join(inner)}'{found}"
        return f"unknown key '{key}'{_suggest_key(path)}"
    if first["type"] == "missing":
        return f"{key} is not set"
    if first["type"] == "value_error":  # our own; one about several keys names them
        message = str(first.get("ctx", {}).get("error"))
        return f"{key}: {message}" if key else message
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


# pydantic names the union member it tried.
_UNION_TAGS = (
    "str GymTask int bool float constrained-float literal['auto','off'] literal['auto']".split()
)


def paths_below(value: Any, path: list[str]) -> Iterator[list[str]]:
    """Every path below `path`, innermost first, and `path` itself."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from paths_below(inner, [*path, str(name)])
    yield path


def _suggest_key(path: Sequence[str]) -> str:
    section: type[BaseModel] = Config
    for name in path[:-1]:
        section = section_of(section.model_fields[name].annotation) or section
    everywhere = keys_by_last_word()
    near = suggest(path[-1], list(section.model_fields), prefix=".".join(path[:-1]))
    if near and path[-1] not in everywhere:
        return near
    close = difflib.get_close_matches(path[-1], everywhere, n=1)
    if close:
        return f"; did you mean '{everywhere[close[0]]}'?"
    return f"; keys there: {', '.join(section.model_fields)}"


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{prefix + '.' if prefix else ''}{close[0]}'?" if close else ""


def section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((s for a in typing.get_args(annotation) if (s := section_of(a))), None)
    return None


def keys_by_last_word() -> dict[str, str]:
    """'lr' -> 'train.lr': of equal last words the outermost key, then the first."""
    keys = sorted(reversed(all_keys()), key=lambda key: -key.count("."))
    return {key.rpartition(".")[2]: key for key in keys}


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, in order."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        keys += all_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys
