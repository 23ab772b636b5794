"""Every TRL name in the key table is a field or an argument of the installed TRL."""

from __future__ import annotations

import inspect
from dataclasses import fields

from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments

from exgrpo_fast.config.hints import OTHER_NAMES


def test_the_names_exist() -> None:
    known = {
        field.name for kind in (GRPOConfig, ModelConfig, ScriptArguments) for field in fields(kind)
    }
    known |= inspect.signature(GRPOTrainer.__init__).parameters.keys()
    named = [name for names in OTHER_NAMES.values() for name in names.trl.split()]
    assert len(named) > 40
    assert [name for name in named if name not in known] == []
