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
