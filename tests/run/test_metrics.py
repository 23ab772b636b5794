"""The list of metric names: who writes one has to list it, and who reads one finds it there."""

from __future__ import annotations

import ast
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.experience.hindsight.source import HindsightReport
from exgrpo_fast.rollout.mismatch import Mismatch
from exgrpo_fast.run.display.columns import COLUMNS
from exgrpo_fast.run.display.steps import StepLine, evaluation_line, plain_line
from exgrpo_fast.run.metrics import METRICS, PHASES, SECTIONS
from exgrpo_fast.run.report import Run, render

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()


def string_literals(*folders: str) -> set[str]:
    """Of the files under the folders."""
    return {
        node.value
        for folder in folders
        for path in (ROOT / folder).glob("**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_a_name_is_listed_once() -> None:
    assert len(METRICS) == sum(map(len, SECTIONS.values()))
    assert all(metric.meaning for metric in METRICS.values())


def test_every_listed_metric_is_written_by_somebody() -> None:
    trainer = ["training", "experience", "rollout", "model"]
    written = string_literals(*(f"exgrpo_fast/{room}" for room in trainer), "kernels")
    assert set(PHASES) <= written
    written |= {f"seconds_{phase}" for phase in PHASES}
    written |= HindsightReport().metrics().keys() | asdict(Mismatch()).keys()
    assert METRICS.keys() - written == set()


class Recorder(dict[str, Any]):
    """Metrics of a step that remember which of them were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


@pytest.fixture
def step() -> Recorder:
    """With a value for each metric, so that no part of a page is left out."""
    shapes = {"replay_buckets": [1, 2], "replay_ages": [3], "reasons": {"ok": 1}}
    return Recorder({name: shapes.get(name, 1) for name in METRICS})


def test_the_report_reads_listed_metrics_only(step: Recorder) -> None:
    page = render(Run("run", steps=[step]))
    assert page.count("<figure") > 20
    assert step.asked - METRICS.keys() == set()
    assert {f"seconds_{phase}" for phase in PHASES} <= step.asked


def test_the_screen_reads_listed_metrics_only(step: Recorder) -> None:
    line = StepLine(step, 1, 2, None, None)
    plain_line(line), evaluation_line(step)
    for column in COLUMNS:
        column.text(line), column.style(line)
    assert {"reward_mean", "truncated_frac", "eval_avg_at_n"} <= step.asked
    assert step.asked - METRICS.keys() == set()


def test_the_page_has_one_row_for_each_metric() -> None:
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS.values()]
    assert [line for line in PAGE.splitlines() if line.startswith("| `")] == rows
    assert [line[3:] for line in PAGE.splitlines() if line.startswith("## ")] == list(SECTIONS)
