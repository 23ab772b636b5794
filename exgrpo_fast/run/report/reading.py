"""Reads a run directory; files and lines that are missing, short or torn are left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exgrpo_fast.run.display import Row
from exgrpo_fast.run.display.formatting import number_of


@dataclass(frozen=True)
class Run:
    """What a run directory holds; empty where it holds nothing readable."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    first_completions: list[Row] = field(default_factory=list)
    last_completions: list[Row] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric is a finite number."""
        pairs = ((step["step"], number_of(step, key)) for step in self.steps)
        return [(step, value) for step, value in pairs if value is not None]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key)]

    def total(self, key: str) -> float:
        return sum(self.values(key))

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """The held-out evaluation under `key` of the summary, when it has a result."""
        value = self.summary.get(key)
        good = isinstance(value, dict) and number_of(value, "avg_at_n") is not None
        return value if good else None

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0


def interval(evaluation: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of an evaluation, when it was measured."""
    low, high = (number_of(evaluation, key) for key in ("avg_at_n_low", "avg_at_n_high"))
    return None if low is None or high is None else (low, high)


def read_run(run_dir: Path) -> Run:
    tables = sorted((run_dir / "completions").glob("step_*.parquet"))
    return Run(
        name=run_dir.resolve().name,
        config=_read_mapping(run_dir / "config.yaml", yaml.safe_load),
        environment=_read_mapping(run_dir / "env.json", json.loads),
        steps=_read_steps(run_dir / "metrics.jsonl"),
        summary=_read_mapping(run_dir / "summary.json", json.loads),
        first_completions=_first_readable(tables),
        last_completions=_first_readable(reversed(tables)),
    )


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        value = parse(_read_text(path))
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps in order, the last line of a repeated step kept, torn lines skipped."""
    steps: dict[int, dict[str, Any]] = {}
    for line in _read_text(path).split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            steps[record["step"]] = record
    return [steps[step] for step in sorted(steps)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_readable(tables: Iterable[Path]) -> list[Row]:
    return next((rows for path in tables if (rows := _read_rows(path))), [])


def _read_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException):
        return []
