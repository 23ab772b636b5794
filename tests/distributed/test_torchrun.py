"""The real command on two processes: the run of one, checkpoints for either, and no orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REWARDS
from several_processes import environment, is_alive, workers_of
from torch import Tensor
from toy_runs import SECONDS, assert_same_course, command, make_inputs, run, run_command, steps

from exgrpo_fast.run.checkpoint.format import Checkpoints, load_state, split_tensors


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, questions, and the run `one` and the run `two`, four steps each."""
    path = tmp_path_factory.mktemp("runs")
    make_inputs(path, model_folder)
    for count, out, start in ((1, "one", run), (2, "two", run_command)):
        ended = start(path, count, out, "--max-steps", "4")
        assert ended.returncode == 0, ended.stderr[-4000:]
    return path


def test_a_rehearsal_changes_nothing(folder: Path) -> None:
    """Two packs for each of two processes; the run that follows is the one without."""
    ended = run(folder, 2, "rehearsed", "--max-steps", "4", "--train.preflight", "always")
    assert ended.returncode == 0, ended.stderr[-4000:]
    (line,) = (line for line in ended.stdout.splitlines() if "preflight:" in line)
    sequences = 2 * 2 * ((1200 - 512) // (8 - 1))  # of 1200 tokens, the prompt read once
    assert f"preflight: {sequences} completions at their longest (519 tokens" in line
    assert_same_course(folder / "rehearsed", folder / "one")
    assert (folder / "rehearsed" / "metrics.jsonl").exists()
    ours, twos = (moments(folder / out / "checkpoints" / "step_4") for out in ("rehearsed", "two"))
    assert all(torch.equal(ours[name], moment) for name, moment in twos.items())


def test_two_processes_make_the_run_of_one(folder: Path) -> None:
    assert_same_course(folder / "two", folder / "one")
    summaries = [json.loads((folder / out / "summary.json").read_text()) for out in ("one", "two")]
    for when in ("eval_before", "eval_after"):
        assert summaries[0][when] == summaries[1][when] is not None
    for path in sorted((folder / "one" / "checkpoints" / "step_4").rglob("*")):
        name = path.relative_to(folder / "one")
        assert (folder / "two" / name).exists(), name
    assert not list((folder / "two").rglob("*.pt")) + list((folder / "two").rglob("*.pkl"))
    ones, twos = (moments(folder / out / "checkpoints" / "step_4") for out in ("one", "two"))
    assert ones.keys() == twos.keys() and len(ones) > 20
    for name, moment in ones.items():
        assert (moment - twos[name]).abs().max() <= 1e-6 * max(1.0, float(moment.abs().max())), name
    parts = folder / "two" / "checkpoints" / "step_4" / "state" / "parts"
    assert len(list(parts.iterdir())) == 2
    assert (folder / "two" / "report.html").exists()


def moments(checkpoint: Path) -> dict[str, Tensor]:
    """Of the optimiser, put together."""
    _, tensors = split_tensors(load_state(checkpoint, only=("learner",)))
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != "step"}


HINDSIGHT = f"""
    --hindsight.enabled true --hindsight.max_prompt_tokens 300
    --reward.functions [{REWARDS}:rubrics] --rollout.max_completion_tokens 12
""".split()


def test_two_processes_revise_what_one_does(folder: Path) -> None:
    """A hindsight prompt speaks of rubrics that the first process alone has read."""
    for count, out in ((1, "revised_by_one"), (2, "revised_by_two")):
        ended = run(folder, count, out, *HINDSIGHT, "--max-steps", "4")
        assert ended.returncode == 0, ended.stderr[-4000:]
    ours, expected = folder / "revised_by_two", folder / "revised_by_one"
    assert_same_course(ours, expected)
    for found, wanted in zip(steps(ours), steps(expected), strict=True):
        for name in ("hindsight_revisions", "hindsight_joined", "hindsight_tokens"):
            assert found[name] == wanted[name], (found["step"], name)
    assert sum(m["hindsight_joined"] for m in steps(expected)) > 0


@pytest.mark.parametrize(("first", "then"), [("two", 1), ("one", 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    folder: Path, first: str, then: int
) -> None:
    """From step 2, to the same steps 3 and 4 as the run that was never stopped."""
    out = f"{first}_then_{then}"
    shutil.copytree(folder / first, folder / out)
    ended = run(folder, then, out, "--max-steps", "4", "--resume", "2")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "resumed after step 2" in ended.stdout
    assert_same_course(folder / out, folder / "one")


def test_released_gradients_make_the_run_of_one(folder: Path) -> None:
    """Two processes, rehearsed, then three from the checkpoint of two."""
    words = ["--train.gradient_release", "true", "--train.max_tokens_per_microbatch", "auto"]
    ended = run(folder, 2, "released", *words, "--max-steps", "2", "--train.preflight", "always")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "preflight:" in ended.stdout
    ended = run(folder, 3, "released", *words, "--max-steps", "4", "--resume", "auto")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "resumed after step 2" in ended.stdout
    assert_same_course(folder / "released", folder / "one")


@pytest.mark.slow  # torchrun gives the others half a minute to end
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_is_killed_ends_the_others(folder: Path) -> None:
    """And the newest checkpoint, perhaps one before the one being written, goes on."""
    words = command(folder, 2, "killed", "--max-steps", "100000", "--checkpoint.every", "1")
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as torchrun:
        try:
            metrics, end = folder / "killed" / "metrics.jsonl", time.monotonic() + SECONDS
            while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
                assert torchrun.poll() is None and time.monotonic() < end
                time.sleep(0.2)
            workers = workers_of(torchrun.pid)
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            torchrun.communicate(timeout=90)
        finally:
            torchrun.kill()
    assert torchrun.returncode != 0
    assert [pid for pid in workers if is_alive(pid)] == []
    newest = Checkpoints(folder / "killed" / "checkpoints").newest_valid(pytest.fail)
    assert newest is not None
    step = int(newest.name.removeprefix("step_"))
    ended = run(folder, 2, "killed", "--max-steps", str(step + 1), "--resume", "auto")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert f"resumed after step {step}" in ended.stdout
