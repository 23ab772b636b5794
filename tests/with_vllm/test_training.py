"""Whole runs through the command, with vLLM as their engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config  # pyright: ignore[reportAttributeAccessIssue]
from several_processes import TORCHRUN, environment

from exgrpo_fast.config import dump_yaml, engine_kind, load_config

STEPS = 4


def write_inputs(folder: Path, model: Path, **sections: Any) -> Path:
    """A config file of a small task whose rewards differ."""
    data = folder / "train.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"What is {i} + 1?", "answer": "3"} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections["data"] = {"train": str(data), "check_answers": False, **sections.get("data", {})}
    sections["train"] = {"max_steps": STEPS, "lr": 0.01, **sections.get("train", {})}
    config = small_config(model, "even_length", sections)
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder / "config.yaml"


def train(config: Path, out: Path, *arguments: str, **popen: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "exgrpo_fast", "train", str(config), "--out", str(out)]
    return subprocess.Popen([*command, "--device", "cpu", *arguments], **popen)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_in_step(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch_max"] < 1e-4 for row in rows)
    assert all(row["sync_gap"] < 1e-5 for row in rows)
    assert all(row["mismatch_corrected_frac"] == 0.0 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows), "nothing was learned, nothing is shown"


def test_auto_leaves_a_cpu_to_transformers() -> None:
    """There vLLM draws no faster, and its completions have to be scored as well."""
    config = small_config(Path("nowhere"), "right", {})
    assert config.rollout.engine == "auto"
    assert engine_kind(config, "cpu") == "transformers"
    assert engine_kind(config, "cuda") == "vllm"


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_a_run_stays_in_step(folders, tmp_path, engine: str) -> None:
    config = write_inputs(tmp_path, folders["untied"], rollout={"engine": engine})
    assert train(config, tmp_path / "run").wait(300) == 0
    rows = metrics_of(tmp_path / "run")
    assert_in_step(rows)
    assert all(row["staleness_max"] == 0 for row in rows)


@pytest.mark.parametrize(("model", "weights"), [("untied", "shared_memory"), ("tied", "broadcast")])
def test_servers_follow_two_processes(folders, tmp_path, model: str, weights: str) -> None:
    """Under torchrun the weights are in parts; the servers get them whole."""
    rollout = {"engine": "vllm_server", "server": {"count": 2, "weights": weights}}
    config = write_inputs(tmp_path, folders[model], rollout=rollout)
    command = [*TORCHRUN, "-m", "exgrpo_fast", "train", str(config), "--device", "cpu"]
    out = tmp_path / "run"
    ended = subprocess.run([*command, "--out", str(out)], env=environment(), timeout=400)
    assert ended.returncode == 0
    assert_in_step(metrics_of(out))


TRUNCATED = {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 0.8}


def assert_truncated_in_step(rows: list[dict[str, Any]]) -> None:
    """The ratio of an update over the kept sets is 1, as that over the whole vocabulary is not."""
    assert_in_step(rows)
    assert all(row["ratio_max"] < 1.001 and row["ratio_mean"] > 0.999 for row in rows)


def test_a_truncated_run_stays_in_step(folders, tmp_path) -> None:
    config = write_inputs(tmp_path, folders["untied"], rollout={"engine": "vllm", **TRUNCATED})
    assert train(config, tmp_path / "run").wait(300) == 0
    assert_truncated_in_step(metrics_of(tmp_path / "run"))


def test_kept_sets_travel_from_servers_to_two_processes(folders, tmp_path) -> None:
    rollout = {"engine": "vllm_server", **TRUNCATED}
    config = write_inputs(tmp_path, folders["untied"], rollout=rollout)
    command = [*TORCHRUN, "-m", "exgrpo_fast", "train", str(config), "--device", "cpu"]
    out = tmp_path / "run"
    ended = subprocess.run([*command, "--out", str(out)], env=environment(), timeout=400)
    assert ended.returncode == 0
    assert_truncated_in_step(metrics_of(out))


RECIPES = """
import sys
from exgrpo_fast.cli import main
for recipe in sys.argv[2].split():
    try:
        main(["train", recipe, "--no-supervise", "--out", f"{sys.argv[1]}/{recipe}", *sys.argv[3:]])
    except SystemExit as end:
        assert end.code == 0, (recipe, end.code)
"""


def test_recipes_run_unchanged(folders, tmp_path) -> None:
    recipes = ["grpo", "dapo", "exgrpo", "herl", "remix"]
    small = load_config(str(write_inputs(tmp_path, folders["tied"])))
    overrides = {
        "model.name": small.model.name,
        "data.train": small.data.train,
        "data.check_answers": False,
        "reward.functions": json.dumps(small.reward.functions),
        "reward.workers": 1,
        "rollout.engine": "vllm",
        "rollout.prompts_per_step": 4,
        "rollout.max_completion_tokens": 12,
        "algorithm.overlong.soft_penalty_tokens": 0,
        "hindsight.max_prompt_tokens": 900,  # the model has 1024 positions
        "train.max_steps": 2,
    }
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-c", RECIPES, str(tmp_path), " ".join(recipes), "--device", "cpu"]
    assert subprocess.run([*command, *words], timeout=400).returncode == 0
    for recipe in recipes:
        rows = metrics_of(tmp_path / recipe)
        assert len(rows) == 2
        assert all(row["mismatch_max"] < 1e-4 and row["sync_gap"] < 1e-5 for row in rows), recipe


def test_generation_ahead_is_one_step_stale_at_most(folders, tmp_path) -> None:
    config = write_inputs(
        tmp_path,
        folders["untied"],
        rollout={"engine": "vllm_server", "generate_ahead": True, "max_completion_tokens": 200},
        train={"max_tokens_per_microbatch": 512},
    )
    assert train(config, tmp_path / "run").wait(300) == 0
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["staleness_max"] == 0
    assert {row["staleness_max"] for row in rows[1:]} <= {0, 1}
    assert any(row["staleness_mean"] > 0 for row in rows[1:])
    stale = max(rows, key=lambda row: row["staleness_mean"])
    assert stale["mismatch_max"] > 1e-4, "older weights drew these tokens"
    assert all(row["sync_gap"] < 1e-5 for row in rows)


def start_with_a_server(folders, tmp_path: Path, *arguments: str) -> subprocess.Popen:
    """A run of some length with one rollout server, two steps into it."""
    config = write_inputs(
        tmp_path,
        folders["untied"],
        rollout={
            "engine": "vllm_server",
            "max_completion_tokens": 256,
            "server": {"deadline_seconds": 5.0},
        },
        checkpoint={"every": 1},
        train={"max_tokens_per_microbatch": 512, "max_steps": 12},
    )
    out = tmp_path / "run"
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = train(config, out, *arguments, text=True, **pipe)
    until = time.monotonic() + 200
    while len(metrics_of(out)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_whose_engine_is_lost_goes_on_by_itself(folders, tmp_path, how) -> None:
    run = start_with_a_server(folders, tmp_path)
    (server,) = children_named(run.pid, "exgrpo_fast.rollout.server.server")
    os.kill(server, how)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "Traceback" not in said and "; restart " not in said
    log = (tmp_path / "run" / "run.log").read_text()
    assert "rollout engine 0 is lost" in log and "rollout engine 0 takes part again" in log
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["sync_gap"] < 1e-5 and row["mismatch_max"] < 1e-4 for row in rows)
    assert named(server) is None


def test_without_a_supervisor_it_ends_and_says_how_to_go_on(folders, tmp_path) -> None:
    words = ["--no-supervise", "--rollout.server.patience_seconds", "1"]
    run = start_with_a_server(folders, tmp_path, *words)
    (server,) = children_named(run.pid, "exgrpo_fast.rollout.server.server")
    os.kill(server, signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 69
    assert "--resume auto goes on from the last checkpoint" in said and "Traceback" not in said


def test_nothing_is_left_of_a_run_that_is_killed(folders, tmp_path) -> None:
    run = start_with_a_server(folders, tmp_path)
    (server,) = children_named(run.pid, "exgrpo_fast.rollout.server.server")
    run.kill()
    run.communicate(timeout=60)
    until = time.monotonic() + 20
    while named(server) and time.monotonic() < until:
        time.sleep(0.1)
    assert named(server) is None


def named(pid: int) -> str | None:
    """The command line of a living process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text() or None
    except OSError:
        return None


def children_named(parent: int, name: str) -> list[int]:
    """Living descendants of a process whose command line holds `name`."""
    import psutil

    return [
        child.pid
        for child in psutil.Process(parent).children(recursive=True)
        if name in " ".join(child.cmdline())
    ]


def test_guided_completions_of_a_run_are_vllms(folders, tmp_path) -> None:
    """EAPO through the command; the prior is another random policy, so much is rejected."""
    config = write_inputs(
        tmp_path,
        folders["untied"],
        rollout={"engine": "vllm"},
        prior_resampling={
            "enabled": True,
            "model": str(folders["prior"]),
            "threshold": 0.1,
            "block_tokens": 4,
            "positive_only": False,
        },
    )
    assert train(config, tmp_path / "run").wait(300) == 0
    rows = metrics_of(tmp_path / "run")
    assert_in_step(rows)
    assert all(row["prior_redrawn_frac"] > 0.02 for row in rows)
