"""One line for every mistake, with the key that was probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from exgrpo_fast.config.schema import Config


def format_validation_error(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    # Unknown keys first; of a union's complaints the one that looked deepest.
    first = max(details, key=lambda d: (d["type"] == "extra_forbidden", len(d["loc"])))
    path = [str(part) for part in first["loc"] if str(part) not in _UNION_TAGS]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_suggest_key(path)}"
    if first["type"] == "missing":
        return f"{key} is not set"
    if first["type"] == "value_error":  # our own words; those about several keys name them
        said = str(first.get("ctx", {}).get("error"))
        return f"{key}: {said}" if key else said
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


_UNION_TAGS = {
    "str",
    "GymTask",
    "int",
    "float",
    "constrained-float",
    "literal['auto','off']",
    "literal['auto']",
}  # pydantic names the union member it tried


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
    """'lr' -> 'train.lr': of several keys the outermost, then the first."""
    keys = sorted(reversed(all_keys()), key=lambda key: -key.count("."))
    return {key.rpartition(".")[2]: key for key in keys}


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, in order."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        inner = section_of(info.annotation)
        keys += all_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys
