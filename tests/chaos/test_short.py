"""`make chaos` in short: a few kills, damages, signals and full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("suite.py")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("chaos") / "chaos.json"
    done = subprocess.run(
        [sys.executable, str(SUITE), "--short", "--out", str(out)], capture_output=True, text=True
    )
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())
    assert done.returncode == (1 if found["missed"] else 0)
    return found


def test_every_goal_is_reached(result) -> None:
    assert [entry for entry in result["table"] if entry["reached"] is False] == []
    numbers = {entry["number"] for entry in result["table"] if entry["reached"]}
    assert {"F1", "F4", "F5", "F6", "F7", "F14", "F22", "F23", "F24"} <= numbers


def test_the_figures_are_those_of_as_many_tries_as_are_claimed(result) -> None:
    figures = result["figures"]
    assert figures["kills"]["kills"] == 4 and figures["corruptions"]["damages"] == 60
    assert figures["kills"]["steps"] > 0 and figures["signals"]["signals"] == 2
