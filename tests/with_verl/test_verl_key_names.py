"""Every verl name in the key table is a path in the config of the installed verl."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from exgrpo_fast.config.hints import OTHER_NAMES

verl = pytest.importorskip("verl", reason="make test-adapters installs verl")

# The whole tree as verl publishes it, its defaults composed.
TREE = Path(verl.__file__).parent / "trainer/config/_generated_ppo_trainer.yaml"


def test_the_names_exist() -> None:
    known = set(paths(yaml.safe_load(TREE.read_text())))
    named = [path for names in OTHER_NAMES.values() for path in names.verl.split()]
    assert len(named) > 40
    assert [path for path in named if path.strip("/").replace("/", ".") not in known] == []


def paths(tree: dict, above: str = "") -> set[str]:
    """Dotted paths of all nodes."""
    found = set()
    for key, value in tree.items():
        path = f"{above}.{key}".lstrip(".")
        found |= {path} | (paths(value, path) if isinstance(value, dict) else set())
    return found
