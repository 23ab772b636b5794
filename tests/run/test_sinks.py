"""Sinks: what is written, what survives a bad disk, and what a hostile text cannot do."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
import threading
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.run.sinks import (
    COMPLETION_COLUMNS,
    CompletionLog,
    FanOut,
    JsonlSink,
    MetricSink,
    TensorBoardSink,
    WandbSink,
    numbers,
    strict,
)


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("plain ünïcode 数学 √2", "plain ünïcode 数学 √2"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]0;title\x07", "\\e]0;title\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("lone \ud800 surrogate", "lone \\ud800 surrogate"),
        ("re\u202eversed", "re\\u202eversed"),
        ("c1 \x9b31m", "c1 \\x9b31m"),
        ("nul \x00", "nul \\0"),
        ("key hf_" + "a" * 34, "key hf_[hidden]"),
    ],
)
def test_text_is_safe_and_readable(dirty, clean):
    assert clean_text(dirty) == clean
    clean_text(dirty).encode("utf-8")


def test_long_lines_are_cut_and_say_so():
    assert (
        clean_text("a" * 30 + "\nshort", max_line=10) == f"{'a' * 10}… (20 more characters)\nshort"
    )


def test_a_line_stays_one_line():
    assert clean_line("a\nb\tc\r\n") == "a\\nb\\tc\\r\\n"


# --- values --------------------------------------------------------------------------------------


def test_values_become_strict_json():
    values = {
        "nan": math.nan,
        "inf": -math.inf,
        "numpy": np.float32(0.5),
        "float64": np.float64("nan"),
        "tensor": torch.tensor([1, 2]),
        "nested": {"x": [math.inf, 1]},
        "flag": True,
        3: "int key",
    }
    assert strict(values) == {
        "nan": None,
        "inf": None,
        "numpy": 0.5,
        "float64": None,
        "tensor": [1, 2],
        "nested": {"x": [None, 1]},
        "flag": True,
        "3": "int key",
    }


def test_only_finite_numbers_are_numbers():
    metrics = {"a": 1, "b": math.nan, "c": "text", "d": {"e": 2.5, "f": None}, "g": [1, 2]}
    assert numbers(metrics) == {"a": 1.0, "d/e": 2.5}


# --- jsonl ---------------------------------------------------------------------------------------


def test_jsonl_is_one_strict_object_a_line(tmp_path):
    sink = JsonlSink(tmp_path / "new" / "metrics.jsonl")
    sink.log(1, {"step": 99, "loss": math.nan, "reasons": {"ok": 3}})
    sink.log(2, {"reward_mean": 0.5})
    assert read(sink.path) == [
        {"step": 1, "loss": None, "reasons": {"ok": 3}},
        {"step": 2, "reward_mean": 0.5},
    ]


def test_a_float_survives_the_round_trip(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"x": 0.1 + 0.2})
    assert read(sink.path)[0]["x"].hex() == (0.1 + 0.2).hex()


def test_resume_drops_later_and_torn_lines(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        sink.log(step, {"x": step})
    with sink.path.open("a") as file:
        file.write('{"step": 2, "x"')  # killed in the middle of a line
    sink.truncate_after(3)
    sink.log(4, {"x": 40})
    assert [(r["step"], r["x"]) for r in read(sink.path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncating_what_is_not_there_is_fine(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.truncate_after(3)
    assert not sink.path.exists()


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x')
    JsonlSink(path).log(2, {"x": 2})
    assert path.read_text() == '{"step": 1, "x\n{"step": 2, "x": 2}\n'


def test_lines_wait_while_the_disk_refuses(tmp_path, caplog):
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    sink = JsonlSink(blocked / "metrics.jsonl")
    with caplog.at_level(logging.WARNING):
        sink.log(1, {})
        sink.log(2, {})
    assert len(caplog.records) == 1
    blocked.unlink()
    sink.log(3, {})
    assert [record["step"] for record in read(sink.path)] == [1, 2, 3]


def test_half_a_write_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"x": 1})
    # The kernel's own "disk full": a file size limit, with the signal that comes with it ignored.
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        sink.log(2, {"x": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert read(path) == [{"step": 1, "x": 1}]
    sink.close()
    assert read(path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}]


# --- the others ----------------------------------------------------------------------------------


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.log(
        1, {"step": 1, "reward_mean": 0.25, "loss": math.nan, "reasons": {"ok": 7}, "hex": "0x"}
    )
    sink.log(2, {"reward_mean": 0.5})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["reasons/ok", "reward_mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(1, 0.25), (2, 0.5)]


class FakeWandb(types.ModuleType):
    def __init__(self, fail=False, wait=None):
        super().__init__("wandb")
        self.fail, self.wait, self.logged, self.finished = fail, wait, [], False

    def init(self, **settings):
        if self.wait:
            self.wait.wait(10)
        if self.fail:
            raise ConnectionError("no network")
        self.settings = settings
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_the_numbers(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("project", "name", {"lr": 1e-6})
    sink.log(1, {"reward_mean": 0.5, "text": "no"})
    sink.close()
    assert fake.settings == {"project": "project", "name": "name", "config": {"lr": 1e-6}}
    assert fake.logged == [(1, {"reward_mean": 0.5})]
    assert fake.finished


def test_a_silent_wandb_server_costs_no_time(monkeypatch):
    answer = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(wait=answer))
    monkeypatch.setattr(WandbSink, "CLOSE_SECONDS", 0.05)
    sink = WandbSink("project")
    sink.log(1, {"x": 1})
    sink.close()
    assert sink._thread.is_alive()  # closing gave up on it instead of waiting
    answer.set()


def test_a_failing_wandb_is_switched_off_with_one_warning(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail=True))
    warnings, wandb, jsonl = [], WandbSink("project"), JsonlSink(tmp_path / "metrics.jsonl")
    wandb._thread.join(5)
    sink = FanOut([wandb, jsonl], warn=warnings.append)
    sink.log(1, {})
    sink.log(2, {})
    sink.close()
    assert warnings == ["WandbSink is switched off: ConnectionError: no network"]
    assert [record["step"] for record in read(jsonl.path)] == [1, 2]


def test_fan_out_survives_a_sink_that_cannot_close():
    class Stubborn(MetricSink):
        def close(self):
            raise RuntimeError("no\x1b[2J")

    warnings = []
    FanOut([Stubborn()], warn=warnings.append).close()
    assert warnings == ["Stubborn is switched off: RuntimeError: no\\e[2J"]


# --- completions ---------------------------------------------------------------------------------


def test_completions_round_trip(tmp_path):
    log = CompletionLog(tmp_path / "completions")
    row = {
        "question_id": "q1",
        "source": "replay",
        "prompt": "2+2",
        "completion": "4 \ud800 \x1b[1m",
        "answer": 4,
        "reward": torch.tensor(1.0),
        "num_tokens": 3,
        "truncated": False,
        "advantage": np.float32(0.5),
        "extra": "is left out",
    }
    path = log.write(12, [row, {}])
    assert path == tmp_path / "completions" / "step_000012.parquet"
    table = pq.read_table(path)
    assert table.column_names == list(COMPLETION_COLUMNS)
    first, second = table.to_pylist()
    assert first["completion"] == "4 \\ud800 \x1b[1m"  # as written, but for what UTF-8 cannot hold
    assert (first["step"], first["answer"], first["reward"], first["advantage"]) == (
        12,
        "4",
        1,
        0.5,
    )
    assert first["mean_entropy"] is None
    assert (second["step"], second["completion"]) == (12, None)


def test_a_table_without_rows_keeps_its_columns(tmp_path):
    table = pq.read_table(CompletionLog(tmp_path).write(1, []))
    assert (table.num_rows, table.column_names) == (0, list(COMPLETION_COLUMNS))


def test_completions_never_stop_a_run(tmp_path, caplog):
    (tmp_path / "completions").write_text("in the way")
    log = CompletionLog(tmp_path / "completions")
    assert log.write(1, [{}]) is None
    assert log.write(2, [{}]) is None
    assert len(caplog.records) == 1


def test_resume_removes_later_tables(tmp_path):
    log = CompletionLog(tmp_path)
    for step in (1, 10, 20):
        log.write(step, [{}])
    log.truncate_after(10)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000001.parquet",
        "step_000010.parquet",
    ]
