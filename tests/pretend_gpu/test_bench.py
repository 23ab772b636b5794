"""The program of the first minutes on a GPU, tried on the pretend one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pretend_gpu.machine import pretend_gpu

from exgrpo_kernels import runtime

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 256)
    return {name: importlib.import_module(name) for name in ("gpu", "report_gpu")}


def measured(programs: dict[str, ModuleType], folder: Path, *stages: str) -> list[dict[str, Any]]:
    with pretend_gpu():
        programs["gpu"].main([*stages, "--out", str(folder), "--small"])
    return programs["report_gpu"].read(folder / "results.jsonl")


def test_ceilings_beside_their_predictions(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = measured(programs, tmp_path, "ceilings")
    assert len(rows) == 7 and [row for row in rows if "error" in row] == []
    text = programs["report_gpu"].report(rows)
    assert "pretend GPU, torch" in text
    assert "| copy |" in text and "| 4.3 TB/s |" in text


@pytest.mark.slow
def test_the_kernels_are_safe(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = measured(programs, tmp_path, "safe", "tiles")
    assert [row for row in rows if "error" in row] == []
    assert {row["name"] for row in rows if row.get("ok")} >= {
        "the host never waits: auto",
        "the same bits: sparsity 0.0001",
        "nothing unwritten: centroids",
    }
    text = programs["report_gpu"].report(rows)
    assert "8 of 8 hold." in text and "| 0.05 |" in text


@pytest.mark.slow
def test_the_long_stages(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = measured(programs, tmp_path, "correct", "ratios", "rows", "trainer")
    absent = {"verl", "quack", "cutlass", "trl", "liger_kernel", "flashoptim", "torch.compile"}
    wrong = [
        row
        for row in rows
        if "error" in row and not any(name in row["name"] + row["error"] for name in absent)
    ]
    assert wrong == []
    assert all(row["ok"] for row in rows if "ok" in row)
    text = programs["report_gpu"].report(rows)
    assert "| three GEMMs, no loss | 64 | 1 | 1 | - |" in text


def test_a_failure_is_a_line_and_stops_nothing(
    programs: dict[str, ModuleType], tmp_path: Path
) -> None:
    recorder = programs["gpu"].Recorder(tmp_path / "results.jsonl", 100.0)
    recorder.measure("first", lambda: 1 / 0)
    recorder.measure("second", lambda: {"ok": True})
    recorder.seconds = 0.0
    recorder.measure("third", lambda: {"ok": True})
    rows = programs["report_gpu"].read(tmp_path / "results.jsonl")
    assert [row["name"] for row in rows] == ["first", "second"]
    assert rows[0]["error"] == "ZeroDivisionError: division by zero"


def test_the_script_leaves_few_files(tmp_path: Path) -> None:
    """Without a GPU every stage ends at once, and says why."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(BENCH / "gpu.sh"), str(tmp_path), "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "ceilings correct safe: exit 2" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8
    assert "Nothing was measured." in (tmp_path / "tables.md").read_text()
