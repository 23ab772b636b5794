"""Python values -> what a config names: rows as a file, functions as references, keywords as keys."""

from __future__ import annotations

import difflib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.config import Config, ConfigError, all_keys, hint, keys_by_last_word
from exgrpo_fast.config.load import assign, read_recipe, validate
from exgrpo_fast.rewards.loading import as_reference
from exgrpo_fast.run.directory import whole_file

Reward = str | Callable[..., Any]
Rows = str | Path | Iterable[Mapping[str, Any]]


def make_config(recipe: str | Path | Config, values: Mapping[str, Any]) -> Config:
    """A recipe, a YAML file or a config, with keyword values on top.

    A keyword is a config key's last word (`lr`, `group_size`), or a section with a dict
    (`replay={"enabled": False}`). ConfigError for an unknown one, with the nearest key.
    """
    if not isinstance(recipe, str | Path | Config):
        raise ConfigError(
            f"recipe: {recipe!r} is neither a recipe's name, a YAML file nor a Config"
        )
    tree = recipe.model_dump() if isinstance(recipe, Config) else read_recipe(str(recipe))
    for key, value in values.items():
        assign_keyword(tree, key, value)
    return validate(tree)


def assign_keyword(tree: dict[str, Any], key: str, value: Any) -> None:
    known = all_keys()
    sections = {name.split(".")[0] for name in known if "." in name}
    if key in sections and isinstance(value, Mapping):
        for name, inner in value.items():
            assign(tree, f"{key}.{name}", inner)
        return
    by_last_word = keys_by_last_word()
    if "." in key or key in known:
        assign(tree, key, value)
    elif key in by_last_word:
        assign(tree, by_last_word[key], value)
    else:
        near = difflib.get_close_matches(key, [*by_last_word, *sections], n=1)
        close = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"unknown keyword '{key}'{hint([key]) or close}")


def as_source(rows: Rows, file: Path) -> str:
    """The name of a file or data set; rows are written to `file` as JSON lines.

    ConfigError for rows that JSON cannot hold, or none.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    try:
        lines = [json.dumps(dict(row), ensure_ascii=False) for row in rows]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rows must be dicts of plain values: {error}") from None
    if not lines:
        raise ConfigError("the rows are empty")
    write_at_once(file, "\n".join(lines) + "\n")
    return str(file)


def write_at_once(file: Path, text: str) -> None:
    """Under torchrun every process writes its inputs, and another may be reading them."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None


def as_references(rewards: Reward | Sequence[Reward], folder: Path) -> list[str]:
    """References under which worker processes find the functions.

    A function of the calling script is imported from there, up to the call of `train`; one of a
    notebook is written to `folder` by its source, so it must import what it uses.
    """
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    if not isinstance(rewards, Iterable):
        raise ConfigError(
            f"reward: {rewards!r} is neither a name nor a function, nor several of them"
        )
    return [_reference(reward, folder) for reward in rewards]


def _reference(reward: Reward, folder: Path) -> str:
    if isinstance(reward, str) or not inspect.isfunction(reward) or reward.__module__ != "__main__":
        return as_reference(reward)
    if Path(inspect.getsourcefile(reward) or "").is_file():
        return as_reference(reward)
    name = reward.__name__
    try:
        source = textwrap.dedent(inspect.getsource(reward))
    except OSError:
        raise ConfigError(f"reward '{name}' has no source: save it in a file") from None
    path = folder / f"{name}.py"
    write_at_once(path, source)
    return f"{path.resolve()}:{name}"
