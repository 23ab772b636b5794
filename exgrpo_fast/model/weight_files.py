"""The files of a folder's weights, checked by their names and headers. Loads no torch.

Which weights a model has only its class says: `load_model` compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from exgrpo_fast.model.folder_reading import PolicyError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def refuse_damaged_weights(name: str) -> None:
    """PolicyError for a folder without safetensors, with a part of them, or with a cut one."""
    folder = Path(name)
    if not folder.is_dir():
        return  # of a hub, which checks what it sends
    if (folder / SINGLE).exists():
        _names_in(folder / SINGLE, name)
        return
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise PolicyError(f"model.name {name}: the folder holds no {SINGLE}{hint}")
    for file, weights in _files_of(folder, name).items():
        if not (folder / file).exists():
            raise PolicyError(f"model.name {name}: {file} is missing, which {INDEX} names")
        if absent := sorted(weights - _names_in(folder / file, name)):
            raise PolicyError(
                f"model.name {name}: {file} does not hold {absent[0]}, as {INDEX} says"
            )


def _names_in(file: Path, name: str) -> set[str]:
    """Of the weights; opening a file compares its length with its header."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"model.name {name}: {file.name} is damaged: {error}") from None


def _files_of(folder: Path, name: str) -> dict[str, set[str]]:
    """File -> the weights that it should hold, as the index says."""
    try:
        index = json.loads((folder / INDEX).read_text())
        weight_map: Mapping[str, str] = index["weight_map"]
        files: dict[str, set[str]] = {}
        for weight, file in weight_map.items():
            files.setdefault(file, set()).add(weight)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"model.name {name}: {INDEX}: {error!r}") from None
    return files
