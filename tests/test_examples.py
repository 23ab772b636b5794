"""The scripts and the notebook of examples/ run as they are, on small models and a few steps."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import run_forked
from several_processes import environment

from exgrpo_fast.api.inputs import make_config
from exgrpo_fast.config import load_config
from exgrpo_fast.run.metrics import METRICS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def run_example(folder: Path, name: str, *options: str) -> str:
    (done,) = run_forked(
        [[str(EXAMPLES / name), *options]],
        folder=folder,
        environments=[environment()],
        seconds=600,
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


# --- the notebook -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_was_run_in_order_and_names_real_keys_and_metrics(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "site-packages" not in str(outputs)  # a warning of the machine that ran it

    (call,) = (
        node
        for cell in cells
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "train"
    )
    source = ast.unparse(call)
    keys = eval(source, {"train": lambda **keys: keys, "STEPS": 3, "WARM_START": 4} | FUNCTIONS)
    for name in ("recipe", "reward", "out", "resume"):
        keys.pop(name)
    config = make_config("quickstart", keys)
    assert (config.train.max_steps, config.warm_start.batches) == (3, 4)

    (shown,) = re.findall(r"shown = (\[.*?\])", "\n".join(cell.source for cell in cells), re.S)
    assert set(ast.literal_eval(shown)) <= METRICS.keys()


FUNCTIONS = {"sum_is_correct": None}


def test_the_notebook_runs_from_top_to_bottom(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    for name, value in (environment() | {"STEPS": "1", "WARM_START": "4"}).items():
        monkeypatch.setenv(name, value)
    where = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where
    ).execute()
    text = str([cell.get("outputs") for cell in done.cells])
    assert "before  avg@4" in text and "image/png" in text
    assert (tmp_path / "runs/notebook/report.html").exists()


# --- clusters -------------------------------------------------------------------------------------


def options_of(script: str) -> list[str]:
    """The words of the one torchrun command, its continued lines joined."""
    joined = script.replace("\\\n", " ")
    (line,) = (x for x in joined.splitlines() if "torchrun" in x and " -m exgrpo_fast" in x)
    return shlex.split(line.rstrip("&"), comments=False)


def assert_goes_on_by_itself(words: list[str]) -> None:
    """torchrun restarts all ranks, each time from the newest checkpoint, in a folder that stays."""
    at = words.index("-m")
    assert int(words[words.index("--max-restarts") + 1]) >= 1
    assert words[words.index("--rdzv-backend") + 1] == "c10d"
    assert words[at : at + 3] == ["-m", "exgrpo_fast", "train"]
    assert words[words.index("--resume") + 1] == "auto" and "--out" in words
    values = ['["http://there:1"]' if word == "$SERVERS" else word for word in words[at:]]
    keys = {w.removeprefix("--"): v for w, v in pairwise(values) if w.startswith("--") and "." in w}
    config = load_config(words[at + 3], list(keys.items()))
    assert config.rollout.engine == "vllm_server"
    assert config.rollout.server.urls or config.rollout.server.gpus == [6, 7]


def test_the_slurm_script_is_bash_and_comes_back() -> None:
    path = EXAMPLES / "cluster" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    script = path.read_text()
    assert_goes_on_by_itself(options_of(script))
    headers = re.findall(r"^#SBATCH --([\w-]+)", script, flags=re.M)
    assert {"nodes", "requeue", "no-kill", "signal", "open-mode", "time"} <= set(headers)
    assert '--nnodes "1:$SLURM_JOB_NUM_NODES"' in script, "the nodes that are left go on"
    assert "trap stop_and_requeue USR1" in script and "scontrol requeue" in script


def test_the_skypilot_file_has_what_a_managed_job_needs() -> None:
    task = yaml.safe_load((EXAMPLES / "cluster" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] == 3
    bash = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert bash.returncode == 0, bash.stderr
    assert_goes_on_by_itself(options_of(task["run"]))
    assert task["envs"]["RUN"].startswith("/runs/") and "/runs" in task["file_mounts"]
