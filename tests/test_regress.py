"""bench/regress.py on made-up results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "bench" / "regress.py"


def step_results(**changes: Any) -> dict[str, Any]:
    """Of two cases, the first with what `changes` says; machine figures are changed as well."""
    row = {"side": "exgrpo_fast", "allocated_mib": 100.0, "step_cpu_seconds": 2.0}
    machine = {"device": "cpu", "cpu": "AMD", "cores": 2, "threads": 1, "torch": "2.13.0"}
    return {
        **machine | {k: v for k, v in changes.items() if k in machine},
        "rows": [
            {"case": "a", **row, **{k: v for k, v in changes.items() if k in row}},
            {"case": "b", **row},
            {"case": "a", **row, "side": "trl"},
        ],
    }


@pytest.fixture
def compared(tmp_path):
    def run(fresh: dict[str, Any] | None) -> tuple[int, str]:
        for name, results in (("before", step_results()), ("after", fresh)):
            (tmp_path / name).mkdir(exist_ok=True)
            if results is not None:
                (tmp_path / name / "step.json").write_text(json.dumps(results))
        command = [sys.executable, PROGRAM, tmp_path / "after", "--baseline", tmp_path / "before"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, done.stdout

    return run


def test_the_same_and_what_is_within_the_tolerances_passes(compared) -> None:
    code, said = compared(step_results(allocated_mib=100.9, step_cpu_seconds=2.19))
    assert code == 0
    assert "0 of 4 figures are worse" in said


def test_memory_may_not_grow_by_more_than_a_hundredth(compared) -> None:
    code, said = compared(step_results(allocated_mib=101.1))
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.endswith("WORSE")]
    assert line.split() == ["a", "allocated_mib", "100.000", "101.100", "+1.1%", "WORSE"]


def test_time_may_not_grow_by_more_than_a_tenth(compared) -> None:
    code, said = compared(step_results(step_cpu_seconds=2.21))
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.endswith("WORSE")]
    assert line.split() == ["a", "step_cpu_seconds", "2.000", "2.210", "+10.5%", "WORSE"]


@pytest.mark.parametrize("other", [{"cpu": "Xeon"}, {"threads": 4}, {"torch": "2.14.0"}])
def test_times_of_another_machine_or_version_are_left_out(compared, other) -> None:
    code, said = compared(step_results(step_cpu_seconds=9.0, **other))
    assert code == 0
    assert "times are not compared" in said and "step_cpu_seconds" not in said
    assert "0 of 2 figures are worse" in said
    code, _ = compared(step_results(allocated_mib=150.0, **other))
    assert code == 1, "memory is compared everywhere"


def test_a_case_that_is_gone_is_a_failure_and_a_new_one_is_not(compared) -> None:
    fewer = step_results()
    fewer["rows"] = [row for row in fewer["rows"] if row["case"] != "b"]
    code, said = compared(fewer)
    assert code == 1
    assert said.count("missing") == 2 and "2 of 4 figures are worse" in said
    more = step_results()
    more["rows"].append({**more["rows"][0], "case": "c", "allocated_mib": 1e6})
    assert compared(more)[0] == 0


def test_nothing_to_compare_is_not_a_pass(compared) -> None:
    code, said = compared(None)
    assert code == 2
    assert "step.json: not in both folders" in said


def test_what_others_need_is_not_compared(compared) -> None:
    worse = step_results()
    worse["rows"][2]["allocated_mib"] = 1e6  # TRL's
    assert compared(worse)[0] == 0


def test_every_committed_case_is_compared() -> None:
    baseline = PROGRAM.parent / "results" / "cpu"
    rows = {
        name: json.loads((baseline / name).read_text())["rows"]
        for name in ("memory.json", "step.json", "loss.json", "cpu_memory.json")
    }
    fused = [row for row in rows["loss.json"] if row["provider"] == "linear_policy_loss"]
    steps, rollouts = (
        [row for row in rows[name] if row["side"] == "exgrpo_fast"]
        for name in ("step.json", "cpu_memory.json")
    )
    assert fused and steps and rollouts
    figures = 3 * len(rows["memory.json"]) + 2 * len(steps) + len(fused) + len(rollouts)
    done = subprocess.run(
        [sys.executable, PROGRAM, baseline, "--baseline", baseline], capture_output=True, text=True
    )
    assert f"0 of {figures} figures are worse" in done.stdout
