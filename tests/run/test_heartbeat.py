"""Signs of life: which phase they name, and that nobody is kept waiting by them."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import make_questions

from exgrpo_fast.core import heartbeat as module
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.heartbeat import HEARTBEAT, Failure, Heartbeat, Supervised


@pytest.fixture
def pipe():
    """(read, heartbeat): read() -> the phases written since."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def read() -> list[str]:
        try:
            return os.read(reader, 1 << 16).decode().splitlines()
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
    beats.begin_step(4)
    assert read() == ["start"]
    beats.begin_step(5)
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


def test_other_threads_are_silent(pipe) -> None:
    read, writer = pipe
    beats = Heartbeat(writer)

    def work() -> None:
        with beats.phase("checkpoint"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert read() == ["start"]


def test_without_a_supervisor_nothing_is_written() -> None:
    beats = Heartbeat()
    with beats.phase("update"):
        beats.beat()
    beats.begin_step(1)


@pytest.fixture
def heard(pipe, monkeypatch) -> Iterator[Callable[[], list[str]]]:
    """What HEARTBEAT writes, with no beat left out."""
    read, writer = pipe
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.0)
    monkeypatch.setattr(HEARTBEAT, "_phases", ["start"])  # other tests have begun steps
    monkeypatch.setattr(HEARTBEAT, "_step", None)
    HEARTBEAT.connect(writer)
    yield read
    HEARTBEAT.connect(None)


def test_the_trainer_beats_without_a_screen(heard, tokenizer, make_test_trainer) -> None:
    """The screen of this trainer shows nothing; every phase and every pass is heard all the same."""
    questions = make_questions(tokenizer, "abcd")
    trainer = make_test_trainer(
        questions,
        function="even_length",
        held_out=questions[:1],
        train={"max_tokens_per_microbatch": 100},
    )
    heard()
    trainer.step()
    phases = heard()
    assert [*dict.fromkeys(phases)] == [
        "start", "replay", "rollout", "score", "prior", "reward", "update", "sync",
    ]  # fmt: skip
    assert phases.count("rollout") > 12  # one for each token
    assert phases.count("score") >= 2
    assert phases.count("update") >= 3
    trainer.step()
    assert heard()[0] == "between"
    trainer.save()
    trainer.evaluate()
    assert {"save", "evaluate", "reward"} <= set(heard())


def test_a_failure_is_reported_in_one_line(pipe) -> None:
    read, writer = pipe
    beats, logged = Heartbeat(writer), []
    with pytest.raises(SystemExit, match="1"), beats.failures_reported(logged.append):
        raise KeyError('\u00e9"\n' * 1000)
    (line,) = [line for line in read() if line != "start"]
    failure = Failure(**json.loads(line))
    assert failure.step is None and failure.message.startswith("KeyError: 'é\"")
    assert len(line.encode()) < 4096  # a longer write to a pipe may be split
    assert "test_heartbeat.py" in logged[0]


def test_a_mistake_and_a_run_without_supervisor_are_left_alone(pipe) -> None:
    read, writer = pipe
    with pytest.raises(UserError), Heartbeat(writer).failures_reported(print):
        raise UserError("a wrong key")
    with pytest.raises(KeyError), Heartbeat().failures_reported(print):
        raise KeyError("a")
    assert read() == ["start"]


def test_what_a_worker_is_told_is_one_word() -> None:
    told = Supervised(123, 4, 5)
    assert Supervised.parse(str(told)) == told and " " not in str(told)
