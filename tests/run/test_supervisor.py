"""The supervisor against workers that are a few lines of Python, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exgrpo_fast.core.heartbeat import Supervised
from exgrpo_fast.run.directory import RunFolder, RunFolderError
from exgrpo_fast.run.supervisor import Deadlines, Supervisor

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import faulthandler, os, pathlib, signal, subprocess, sys, time
from exgrpo_fast.core.heartbeat import HEARTBEAT as heartbeat, Supervised
told, resume = Supervised.parse(sys.argv[1]), sys.argv[2] == "True"
told.take_over()
life = int(pathlib.Path("lives").read_text()) if pathlib.Path("lives").exists() else 0
pathlib.Path("lives").write_text(str(life + 1))
assert resume == (life > 0)
from exgrpo_fast.run.directory import GuestFolder, RunFolder
folder = GuestFolder(pathlib.Path("."))
def save(step):
    os.makedirs(f"checkpoints/step_{step}")
"""


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch) -> Callable[..., tuple[int, int]]:
    """supervise(body, deadline=...) -> (exit code, lives), in tmp_path."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    monkeypatch.chdir(tmp_path)

    def run(body: str, *, deadline: float = 30.0) -> tuple[int, int]:
        folder = RunFolder(tmp_path, resume=True)
        try:
            code = make(body, folder, deadline).run()
        finally:
            folder.close()
        return code, int((tmp_path / "lives").read_text())

    return run


def make(body: str, folder: RunFolder, deadline: float = 30.0) -> Supervisor:
    script = HEAD + textwrap.dedent(body)

    def command(told: Supervised, resume: bool) -> list[str]:
        return [sys.executable, "-c", script, str(told), str(resume)]

    return Supervisor(command, folder, deadline=deadline)


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "run.log").read_text()


def gone(pid: int) -> bool:
    """Within a few seconds."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("code", [0, 2, 70, 74])
def test_an_answer_is_handed_on(supervise, code: int) -> None:
    assert supervise(f"sys.exit({code})") == (code, 1)


@pytest.mark.parametrize(
    "accident", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(1)", "os._exit(139)"]
)
def test_an_accident_is_tried_again_from_the_checkpoint(supervise, accident: str) -> None:
    assert supervise(f"if life < 2: save(life); {accident}") == (0, 3)


def test_three_restarts_without_a_checkpoint_are_enough(supervise, tmp_path: Path, capsys) -> None:
    with_phase = "with heartbeat.phase('update'): os._exit(9)"
    assert supervise(with_phase) == (75, 4)
    said = "the run ended in phase update (exit code 9)"
    assert log_of(tmp_path).count(f"{said}; restart ") == 3
    assert f"{said}; gave up after 3 restarts without a checkpoint" in log_of(tmp_path)
    assert "restart 3 of 3 from the beginning" in capsys.readouterr().err


FAILS = """
with heartbeat.failures_reported(lambda text: RunFolder.append_to_log(folder, text)):
    heartbeat.begin_step(STEP)
    raise ValueError(f"no such row at {hex(id(object()) + life)}")
"""


def test_the_same_exception_at_the_same_step_ends_the_run_at_the_second_time(
    supervise, tmp_path: Path, capsys
) -> None:
    """A checkpoint in between makes no difference, nor does an address in the message."""
    assert supervise("save(life)" + FAILS.replace("STEP", "7")) == (1, 2)
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    what = "the run ended with ValueError: no such row at 0x..., at step 7"
    assert f"{what}; restart 1 of 3 from step 0" in said
    assert f"{what} again; it is not restarted, run.log has the tracebacks" in said
    assert log_of(tmp_path).count("Traceback") == 2


def test_exceptions_of_different_steps_are_tried_again(supervise, capsys) -> None:
    assert supervise(FAILS.replace("STEP", "life")) == (75, 4)
    assert capsys.readouterr().err.count("Traceback") == 4


def test_progress_forgives(supervise, tmp_path: Path) -> None:
    """A checkpoint in every third life: eleven lives, never three restarts without one."""
    assert supervise("if life % 3 == 2: save(life)\nif life < 10: os._exit(1)") == (0, 11)
    assert "restart 1 of 3 from step 8" in log_of(tmp_path)


def test_silence_is_ended_with_the_stacks_in_the_log(supervise, tmp_path: Path) -> None:
    body = """
    faulthandler.enable(file=open("run.log", "a"))
    def where_it_hangs():
        time.sleep(1000)
    with heartbeat.phase("rollout"):
        if life == 0:
            where_it_hangs()
    """
    assert supervise(body, deadline=0.6) == (0, 2)
    assert "no sign of life for 1 s in phase rollout (S (sleeping)): stopped" in log_of(tmp_path)
    assert "in where_it_hangs" in log_of(tmp_path)
    assert "the run ended in phase rollout (SIGABRT); restart 1 of 3" in log_of(tmp_path)


def test_a_stopped_worker_is_killed(supervise, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("exgrpo_fast.run.supervisor.SECONDS_TO_DUMP", 0.2)
    body = "with heartbeat.phase('x'):\n    if life == 0: os.kill(os.getpid(), signal.SIGSTOP)"
    assert supervise(body, deadline=0.6) == (0, 2)
    assert "(T (stopped)): stopped" in log_of(tmp_path)
    assert "ended in phase x (SIGKILL)" in log_of(tmp_path)


def test_beats_keep_it_alive_and_slow_phases_have_patience(supervise) -> None:
    body = """
    time.sleep(1.0)  # 'start' may take six times the deadline
    with heartbeat.phase("rollout"):
        for _ in range(10):
            time.sleep(0.15)
            heartbeat.beat()
    """
    assert supervise(body, deadline=0.6) == (0, 1)


def test_a_deadline_is_ten_times_the_usual_silence() -> None:
    deadlines = Deadlines(20.0)
    assert (deadlines.of("rollout"), deadlines.of("start")) == (20.0, 120.0)
    for gap in (1.0, 3.0, 400.0):
        deadlines.seen("rollout", gap)
    assert (deadlines.of("rollout"), deadlines.of("score")) == (30.0, 20.0)


def test_children_of_a_dead_worker_are_not_left(supervise, tmp_path: Path) -> None:
    body = """
    if life == 0:
        child = subprocess.Popen(["sleep", "1000"])
        pathlib.Path("child").write_text(str(child.pid))
        os._exit(1)
    """
    assert supervise(body) == (0, 2)
    assert gone(int((tmp_path / "child").read_text()))


WAITS_FOR_A_SIGNAL = """
def stop(number, frame):
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").write_text(str(os.getpid()))
while True:
    heartbeat.beat()
    time.sleep(0.02)
"""


def send(number: int, tmp_path: Path, times: int = 1) -> None:
    def when_ready() -> None:
        while not (tmp_path / "ready").exists() or not (tmp_path / "ready").read_text():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    threading.Thread(target=when_ready).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_not_tried_again(supervise, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    send(number, tmp_path)
    assert supervise(WAITS_FOR_A_SIGNAL) == (128 + number, 1)
    assert signal.getsignal(number) is before


def test_a_worker_that_finishes_all_the_same_is_done(supervise, tmp_path: Path) -> None:
    send(signal.SIGTERM, tmp_path)
    assert supervise(WAITS_FOR_A_SIGNAL.replace("128 + number", "0")) == (0, 1)


def test_the_third_signal_kills(supervise, tmp_path: Path) -> None:
    send(signal.SIGINT, tmp_path, times=3)
    deaf = WAITS_FOR_A_SIGNAL.replace("sys.exit(128 + number)", "pass")
    assert supervise(deaf) == (130, 1)


def test_a_worker_dies_with_its_supervisor_and_the_lock_is_free(tmp_path: Path) -> None:
    """kill -9 to the supervisor: nobody goes on writing, and the next start works."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "run")!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_supervisor import WAITS_FOR_A_SIGNAL, make
from exgrpo_fast.run.directory import RunFolder
make(WAITS_FOR_A_SIGNAL, RunFolder(Path("."), resume=True)).run()
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    supervisor = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    try:
        ready = tmp_path / "ready"
        while not ready.exists() or not ready.read_text():
            assert supervisor.poll() is None
            time.sleep(0.01)
        with pytest.raises(RunFolderError, match=rf"writing there \(process {supervisor.pid} "):
            RunFolder(tmp_path, resume=True)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert gone(int(ready.read_text()))
    RunFolder(tmp_path, resume=True).close()


def test_no_torch_is_loaded() -> None:
    code = "import sys, exgrpo_fast.run.supervisor; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"False\n"
