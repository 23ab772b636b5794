"""Signs of life: which phase they name, and that nobody is kept waiting by them."""

from __future__ import annotations

import fcntl
import os

import pytest

from exgrpo_fast.core import heartbeat as module
from exgrpo_fast.core.heartbeat import Heartbeat, Supervised
from exgrpo_fast.run.display import HeartbeatScreen, NullScreen


@pytest.fixture
def pipe():
    """(read, heartbeat): read() -> the phases written since."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def read() -> list[str]:
        try:
            return os.read(reader, 1 << 16).decode().split()
        except BlockingIOError:
            return []

    yield read, writer
    os.close(reader)
    os.close(writer)


def test_the_innermost_phase_is_named(pipe, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.0)
    read, writer = pipe
    beats = Heartbeat(writer)
    assert read() == ["start"]
    with beats.phase("rollout"):
        with beats.phase("reward"):
            beats.beat()
        beats.beat()
    assert read() == ["rollout", "reward", "reward", "rollout", "rollout", "start"]
    beats.started()
    with pytest.raises(RuntimeError), beats.phase("update"):
        raise RuntimeError
    assert read() == ["between", "update", "between"]


def test_beats_in_quick_succession_are_one(pipe, monkeypatch) -> None:
    read, writer = pipe
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    beats = Heartbeat(writer)
    for now[0] in (100.05, 100.09, 100.11, 100.2):
        beats.beat()
    assert read() == ["start", "start"]


def test_a_full_pipe_and_a_gone_reader_keep_nobody_waiting() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    beats = Heartbeat(writer)
    for _ in range(2000):
        with beats.phase("update"):
            pass
    os.close(reader)
    with beats.phase("update"):
        pass
    os.close(writer)


def test_a_watched_screen_shows_everything_and_beats(pipe, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.0)
    read, writer = pipe
    shown: list[object] = []

    class Recorder(NullScreen):
        def step(self, metrics, *, total_steps) -> None:
            shown.append((metrics, total_steps))

        def completions(self, rows) -> None:
            shown.append(rows)

        def note(self, text) -> None:
            shown.append(text)

        def close(self) -> None:
            shown.append("closed")

    screen = HeartbeatScreen(Recorder(), Heartbeat(writer))
    with screen.phase("rollout", 8) as advance:
        advance()
        advance(3)
        screen.heartbeat()
    screen.step({"step": 1}, total_steps=2)
    screen.note("n")
    screen.completions([{"a": 1}])
    screen.close()
    assert shown == [({"step": 1}, 2), "n", [{"a": 1}], "closed"]
    assert read() == ["start", *["rollout"] * 4, "start", "between", "between"]


def test_what_a_worker_is_told_is_one_word() -> None:
    told = Supervised(123, 4, 5)
    assert Supervised.parse(str(told)) == told and " " not in str(told)
