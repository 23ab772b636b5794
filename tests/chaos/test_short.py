"""`make chaos` in short: a few kills, damages, signals and full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("suite.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("chaos") / "chaos.json"
    done = subprocess.run(
        [sys.executable, str(SUITE), "--short", "--out", str(out)], capture_output=True, text=True
    )
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())
    assert done.returncode in (0, 1)
    return found


def test_every_goal_is_reached(result) -> None:
    table = [entry for part in result.values() for entry in part["table"]]
    missed = [entry for entry in table if entry["reached"] is False]
    assert [entry for entry in missed if not entry["timed"]] == []
    numbers = {entry["number"] for entry in table if entry["reached"]}
    assert {"F1", "F4", "F5", "F6", "F7", "F14", "F22", "F23", "F24"} <= numbers


def test_the_figures_are_those_of_as_many_tries_as_are_claimed(result) -> None:
    kills, damage = result["kills"]["figures"], result["corruptions"]["figures"]
    assert kills["kills"] == sum(kills["phases"].values()) == 4 and kills["steps"] > 0
    assert damage["damages"] == sum(damage["by_kind"].values()) == 80
    assert result["signals"]["figures"]["signals"] == 2
