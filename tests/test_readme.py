"""The README shows what bench/results/ holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import readme  # noqa: E402

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("scheme", readme.SCHEMES)
def test_the_picture_is_that_of_the_results(scheme: str) -> None:
    results = json.loads(readme.RUN.read_text())
    drawn = readme.picture(results, scheme)
    assert (ROOT / f"docs/report-{scheme}.svg").read_text() == drawn, "run bench/readme.py"
    assert "6.4 % [3.0, 10.3] →" in drawn and "68.8 % [61.5, 76.1]" in drawn
    assert f"docs/report-{scheme}.svg" in README


def test_a_larger_card_holds_no_smaller_model() -> None:
    sizes = [None, "0.5B", "1.5B", "3B", "7B", "14B", "32B"]
    for row in json.loads((ROOT / "bench/results/what_fits.json").read_text())["rows"]:
        found = [sizes.index(size) for card, size in row.items() if card != "kind"]
        assert found == sorted(found)


def test_the_facts_are_those_of_the_results() -> None:
    text = " ".join(README.split())
    rows = json.loads((ROOT / "bench/results/cpu/loss.json").read_text())["rows"]
    [loss] = [
        row
        for row in rows
        if (row["case"], row["provider"]) == ("with entropy gradient", "linear_policy_loss")
    ]
    time, memory = loss["time_to_naive"], loss["memory_to_naive"]
    assert f"{time:.2f} of plain PyTorch's time in {memory:.2f} of its memory" in text
    steps = json.loads((ROOT / "bench/results/cpu/step.json").read_text())
    assert steps["threads"] == 1 and "TRL's GRPOTrainer on one CPU thread" in text
