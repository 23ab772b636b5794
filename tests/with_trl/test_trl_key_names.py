"""Every TRL name in the key table is a field or an argument of the installed TRL."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from exgrpo_fast.config.hints import OTHER_NAMES

trl = pytest.importorskip("trl", reason="make test-adapters installs TRL")


def test_the_names_exist() -> None:
    kinds = (trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments)
    known = {field.name for kind in kinds for field in fields(kind)}
    known |= inspect.signature(trl.GRPOTrainer.__init__).parameters.keys()
    named = [name for names in OTHER_NAMES.values() for name in names.trl.split()]
    assert len(named) > 40
    assert [name for name in named if name not in known] == []
