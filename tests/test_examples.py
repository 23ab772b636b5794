"""The scripts of examples/ run as they are, on small models and a few steps."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from several_processes import environment

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(folder: Path, name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lean_loop_learns_by_imitation_stores_and_replays(tmp_path: Path) -> None:
    printed = run_example(tmp_path, "lean_loop.py", "--batches", "150", "--steps", "5")
    (imitated,) = re.findall(r"after imitation: ([\d.]+)%", printed)
    assert float(imitated) > 15  # a policy without training: 0
    steps = [
        (int(replayed), int(stored))
        for replayed, stored in re.findall(r"replayed +(\d+)  stored +(\d+)", printed)
    ]
    assert len(steps) == 5 and steps[0][0] == 0 < steps[0][1]
    for (_, stored), (replayed, _) in zip(steps, steps[1:], strict=False):
        assert replayed == min(stored, 16)


def test_the_lean_loop_is_short() -> None:
    source = (EXAMPLES / "lean_loop.py").read_text()
    (step,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "train_step"
    )
    assert len(source.splitlines()) < 250
    assert step.end_lineno is not None and step.end_lineno - step.lineno < 75


def test_own_reward(tmp_path: Path, model_folder: Path) -> None:
    printed = run_example(tmp_path, "own_reward.py", "--model", str(model_folder), "--steps", "1")
    assert re.search(r"^1 reward 0\.\d\d \{", printed, re.M)
    assert (tmp_path / "runs/own-reward/checkpoints/step_1/hf/config.json").exists()


def test_the_reward_of_the_example() -> None:
    reward = load_example("own_reward").only_the_sum
    completions = ["5", " 5.", "2 + 3 = 5", "6", ""]
    assert reward(completions, ["5"] * 5) == [
        (1.0, "correct"),
        (1.0, "correct"),
        (0.2, "wordy"),
        (0.0, "wrong"),
        (0.0, "wrong"),
    ]


def test_own_data(tmp_path: Path, model_folder: Path) -> None:
    printed = run_example(tmp_path, "own_data.py", "--model", str(model_folder), "--steps", "1")
    assert re.search(r"avg@2 on held-out rows: \d+\.\d% before, \d+\.\d% after", printed)
    row = load_example("own_data").row
    assert row(42) == {"task": "Write forty-two in digits.", "solved": 42, "digits": 2}
    assert [row(n)["task"].split()[1] for n in (0, 19, 20, 99)] == [
        "zero",
        "nineteen",
        "twenty",
        "ninety-nine",
    ]
