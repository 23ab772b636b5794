"""What clusters do to a run under torchrun: SIGTERM with a grace, and a rank that hangs.

What the heartbeat of each rank finds is tested in tests/run/test_rank_watch.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import run_forked
from several_processes import TORCHRUN, environment, is_alive, workers_of
from toy_runs import SECONDS, arguments, command, make_inputs, run, steps

from exgrpo_fast.run.checkpoint.format import Checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
LONG = ["--max-steps", "100000", "--checkpoint.every", "1", "--deterministic", "--eval.every", "0"]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    make_inputs(tmp_path, model_folder)
    return tmp_path


@contextmanager
def two_ranks(folder: Path, out: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun with two ranks, after their second step."""
    words = command(folder, 2, out, *LONG, *more)
    at = words.index("--nproc-per-node")
    words[at:at] = ["--max-restarts", "1"]
    log = (folder / f"{out}.log").open("w")
    with subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=log, stderr=log, text=True
    ) as torchrun:
        try:
            until_step(folder / out, 2, torchrun)
            yield torchrun
        finally:
            torchrun.kill()


def until_step(out: Path, step: int, torchrun: subprocess.Popen[str]) -> None:
    metrics, end = out / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert torchrun.poll() is None and time.monotonic() < end
        time.sleep(0.1)


def newest_step(out: Path) -> int:
    newest = Checkpoints(out / "checkpoints").newest_valid(pytest.fail)
    assert newest is not None
    return int(newest.name.removeprefix("step_"))


def assert_unbroken(folder: Path, out: str, last: int) -> None:
    """Every loss is, bit for bit, that of an uninterrupted run."""
    ended = run(folder, 2, "unbroken", *LONG, "--stop-after", str(last))
    assert ended.returncode == 0, ended.stderr[-4000:]
    ours, expected = steps(folder / out), steps(folder / "unbroken")
    assert [m["step"] for m in ours] == list(range(1, last + 1))
    assert [m["loss_hex"] for m in ours] == [m["loss_hex"] for m in expected]


@pytest.mark.slow  # three runs of two processes, each from torchrun
def test_sigterm_to_torchrun_saves_and_the_run_goes_on_bit_for_bit(folder: Path) -> None:
    with two_ranks(folder, "preempted") as torchrun:
        workers = workers_of(torchrun.pid)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(60)  # it kills after 30 s
    assert torchrun.returncode == 1, "torchrun's own code for a signal"
    assert [pid for pid in workers if is_alive(pid)] == []
    step = newest_step(folder / "preempted")
    assert step == steps(folder / "preempted")[-1]["step"], "no finished step is lost"
    resumed = run(folder, 2, "preempted", *LONG, "--resume", "auto", "--stop-after", "2")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert f"resumed after step {step}" in resumed.stdout
    assert_unbroken(folder, "preempted", step + 2)


@pytest.mark.slow  # on a busy machine a rank that runs may be silent for some seconds: 24 s here
def test_a_rank_that_is_frozen_is_found_and_all_start_again(folder: Path) -> None:
    """By the other one, in two fifths of the deadline; collectives have 1800 s."""
    with two_ranks(folder, "hung", "--resume", "auto", "--deadline", "60") as torchrun:
        hanging = workers_of(torchrun.pid)[1]
        os.kill(hanging, signal.SIGSTOP)
        stopped_at = steps(folder / "hung")[-1]["step"]
        until_step(folder / "hung", stopped_at + 3, torchrun)
        assert not is_alive(hanging)
        again = workers_of(torchrun.pid)
        assert len(again) == 2 and hanging not in again
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(60)
    log = (folder / "hung.log").read_text()
    assert log.count("resumed after step") == 1
    assert log.count("rank 1 is frozen: no sign of life for 24 s; all ranks end") == 1
    assert "frozen" in (folder / "hung" / "run.log").read_text()
    assert_unbroken(folder, "hung", newest_step(folder / "hung"))


@pytest.mark.slow  # torchrun waits half a minute for a node that may still come
def test_a_node_that_is_lost_leaves_the_run_to_the_other(folder: Path) -> None:
    """Two agents of one rank each, of which one is enough (`--nnodes 1:2`)."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "a"]
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    words = [*TORCHRUN[:3], *elastic, *meeting, "--local-addr", "127.0.0.1"]
    words += arguments(folder, 2, "elastic", *LONG, "--resume", "auto")
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(started(words, folder, "0.log"))]
        until_it_listens(port)  # the first one has the store, which is not to be lost
        agents.append(stack.enter_context(started(words, folder, "1.log")))
        until_step(folder / "elastic", 2, agents[0])
        workers = workers_of(agents[1].pid)
        for pid in (agents[1].pid, *workers):  # the agent first: it would start them again
            os.kill(pid, signal.SIGKILL)
        stopped_at = steps(folder / "elastic")[-1]["step"]
        until_step(folder / "elastic", stopped_at + 3, agents[0])
        agents[0].send_signal(signal.SIGTERM)
        agents[0].wait(60)
    log = (folder / "0.log").read_text()
    assert log.count("resumed after step") == 1
    last = newest_step(folder / "elastic")
    ended = run(folder, 1, "unbroken", *LONG, "--stop-after", str(last))
    assert ended.returncode == 0, ended.stderr[-4000:]
    for found, wanted in zip(steps(folder / "elastic"), steps(folder / "unbroken"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert found["reward_mean"] == wanted["reward_mean"]


def until_it_listens(port: int) -> None:
    end = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < end
        time.sleep(0.1)


@contextmanager
def started(words: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    with (folder / name).open("w") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(), stdout=log, stderr=log, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_main_thread_that_hangs_ends_its_rank_with_its_stacks(tmp_path: Path) -> None:
    """Its other threads run, so it does not look frozen; its peer waits in a collective."""
    worker = str(Path(__file__).with_name("hanging_worker.py"))
    waiting, hanging = run_forked(
        [[worker, str(rank), "2", f"{tmp_path}/store"] for rank in range(2)],
        folder=tmp_path,
        environments=[environment()] * 2,
        seconds=SECONDS,
    )
    assert hanging.returncode == 1
    assert "rank 1 hangs: no progress for 4 s in phase update; all ranks end" in hanging.stderr
    assert "in hang\n" in hanging.stderr, "the stack of the main thread"
    assert waiting.stdout.splitlines()[-1] == "RankLost"
