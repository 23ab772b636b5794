"""Reads a run directory; files and lines that are missing, short or torn are left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.data.sources import DataError, parquet_rows
from exgrpo_fast.run.directory import is_written
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
    is_running: bool = False  # a process is writing into the directory

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
    def shown_environment(self) -> dict[str, Any]:
        return {key: value for key, value in self.environment.items() if key != "checks"}

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def max_steps(self) -> int | None:
        """The step with which the run ends, by its config."""
        section = self.config.get("train")
        number = number_of(section, "max_steps") if isinstance(section, dict) else None
        return None if number is None else int(number)


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
        is_running=is_written(run_dir),
    )


def read_runs(folders: Sequence[Path], *, may_be_empty: bool = False) -> list[Run]:
    """The runs, under names that differ: as much of the end of each path as that takes.

    UserError in one line for a folder that is no run or is given twice, and for a run without
    metrics unless it `may_be_empty`.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given twice")
        refuse_other_folders(folder)
    runs = [read_run(path) for path in paths]
    for folder, run in zip(folders, runs, strict=True):
        if not (run.steps or may_be_empty):
            raise UserError(f"{folder} has no metrics yet: no step of it has finished")
    return [replace(run, name=name) for run, name in zip(runs, distinct_names(paths), strict=True)]


def refuse_other_folders(folder: Path) -> None:
    """UserError for what is no run directory."""
    if not folder.exists():
        raise UserError(f"there is no run '{folder}'")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"'{folder}' is no run directory: it has no config.yaml or metrics.jsonl")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """/a/x/out, /a/y/out -> x/out, y/out; a single path -> its last part."""
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """{'a': {'b': 1}} -> [('a.b', 1)], in order."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            shown = json.dumps(value, default=str) if isinstance(value, list | bool) else value
            pairs.append((f"{prefix}{key}", shown))
    return pairs


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
    try:
        return list(parquet_rows(path))
    except (OSError, DataError):
        return []
