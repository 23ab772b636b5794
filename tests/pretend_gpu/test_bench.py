"""The program of the first minutes on a GPU, tried on the pretend one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pretend_gpu.machine import pretend_gpu

from exgrpo_fast.training.preflight import Rehearsal
from exgrpo_kernels import runtime, sparse_backward

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 256)
    # Buffers that another pretend GPU has made are no memory of this one.
    monkeypatch.setattr(sparse_backward, "_MEMORIES", defaultdict(sparse_backward.DensityMemory))
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
    absent = {"verl", "quack", "cutlass", "trl", "liger_kernel", "flash_adamw", "torch.compile"}
    wrong = [
        row
        for row in rows
        if "error" in row and not any(name in row["name"] + row["error"] for name in absent)
    ]
    assert wrong == []
    assert all(row["ok"] for row in rows if "ok" in row)
    text = programs["report_gpu"].report(rows)
    assert "| three GEMMs, no loss | 64 | 1 | 1 | - |" in text


def test_the_plan_stands_beside_the_worst_step(
    programs: dict[str, ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"peak_memory_gib": 9.5, "seconds_step": 2.0}\n')
    (tmp_path / "run.log").write_text(Rehearsal(10.0, 4, 80).note(9.75 * 2**30))
    found = programs["gpu"].figures_of(tmp_path)
    assert found == {
        **{"peak_memory_gib": 9.5, "seconds_step": 2.0},
        **{"rehearsed_gib": 10.0, "planned_gib": 9.75},
    }
    rows = [{"stage": "trainer", "name": "adamw", "at": 1.0, **found}]
    rows.append({"stage": "trainer", "name": "other", "at": 2.0, "error": "no"})
    text = programs["report_gpu"].memory(rows)
    assert "| adamw | 9.5 | 10 | 9.75 | 0.975 |" in text
    assert "| other | - | - | - | - | no |" in text


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


def run_script(folder: Path, **environment: str) -> str:
    """What `bench/gpu.sh` prints; its stages have ten times as long as on a GPU."""
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = ["bash", str(BENCH / "gpu.sh"), str(folder), "5200"]
    usual |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(folder / "../cache")}
    done = subprocess.run(command, env=usual | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_script_on_the_pretend_gpu(tmp_path: Path) -> None:
    """One measurement of each stage; the trainer has tests of its own. A wheel is installed first."""
    (tmp_path / "wheels").mkdir()
    make_wheel(tmp_path / "wheels", "carried", "raise SystemExit('carried wheels are found')")
    python = tmp_path / "python"
    program = Path(__file__).with_name("run_program.py")
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *trainer*) exec {sys.executable} -c "import carried" ;; esac\n'
        f'exec {sys.executable} {program} "$@"\n'
    )
    python.chmod(0o755)
    printed = run_script(
        tmp_path / "out",
        PYTHON=str(python),
        WHEELS=str(tmp_path / "wheels"),
        BENCH_OPTIONS="--small --first 1",
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    for stages in ("ceilings correct safe", "ratios tiles", "rows"):
        assert f"== {stages}: exit 0" in printed, log[-3000:]
    assert "carried wheels are found" in log
    assert printed.count("1 of 1 hold.") == 2  # correct, safe
    assert "| three GEMMs, no loss | 64 | 1 | 1 | - |" in printed
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "machine.txt", "results.jsonl", "tables.md"]


def make_wheel(folder: Path, name: str, text: str) -> None:
    """A wheel of one module."""
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", text + "\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_script_leaves_few_files(tmp_path: Path) -> None:
    """Without a GPU every stage ends at once, and says why."""
    printed = run_script(tmp_path, PYTHON=sys.executable)
    assert "ceilings correct safe: exit 2" in printed
    assert len(list(tmp_path.iterdir())) <= 8
    assert "Nothing was measured." in (tmp_path / "tables.md").read_text()
