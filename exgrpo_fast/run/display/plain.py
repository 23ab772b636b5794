"""The screen off a terminal: plain lines for files, pipes and dumb terminals."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.core.types import Metrics
from exgrpo_fast.run.display import Advance, Row, Screen
from exgrpo_fast.run.display.formatting import (
    best_and_worst,
    duration,
    excerpt,
    joined,
    verdict_line,
)
from exgrpo_fast.run.display.steps import Clock, StepReader, evaluation_line, plain_line


class PlainScreen(Screen):
    """Plain lines for files, pipes and dumb terminals: one a step, no carriage returns.

    A phase is reported only when it is slow. The first of its name is reported after `first_after`
    seconds and at its end; later ones, whose times are on the step lines, only from `again_after` on.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        first_after: float = 2.0,
        again_after: float = 30.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._first_after, self._again_after = first_after, again_after
        self._clock = clock
        self._reader = StepReader(clock)
        self._known: set[str] = set()
        self._lock = threading.RLock()  # a signal's note may come in the middle of a line

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        phase = _Phase(name, total, self._clock)
        watcher = threading.Thread(target=self._watch, args=(phase,), daemon=True)
        watcher.start()
        try:
            yield phase.advance
        finally:
            phase.finished.set()
            watcher.join()
            self._known.add(name)
        if phase.announced:
            self._print(phase.result())

    def _watch(self, phase: _Phase) -> None:
        wait = self._again_after if phase.name in self._known else self._first_after
        while not phase.finished.wait(wait):
            phase.announced = True
            self._print(phase.progress())
            wait = self._again_after

    def step(self, metrics: Metrics, *, total_steps: int) -> None:
        line = self._reader.read(metrics, total_steps)
        self._print(plain_line(line))
        if evaluation := evaluation_line(metrics):
            self._print(f"step {line.step}/{total_steps} · {evaluation}")

    def completions(self, rows: Sequence[Row]) -> None:
        if rows:
            self._print(f"question · {clean_line(rows[0].get('prompt', ''), max_line=400)}")
            self._print(f"answer · {clean_line(rows[0].get('answer', ''), max_line=200)}")
        for name, row in best_and_worst(rows):
            self._print(f"{name} · {verdict_line(row)}")
            for text_line in excerpt(row.get("completion", "")).split("\n"):
                self._print(f"    | {text_line}")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        # A closed pipe or a full disk under a redirected output must not end a run.
        # RuntimeError: the note of a signal that came while the stream was flushing.
        with self._lock, contextlib.suppress(OSError, ValueError, RuntimeError):
            line = clean_text(text) + "\n"
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(line.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()


class _Phase:
    """A running phase; written by the trainer's thread, read by the reporting one."""

    def __init__(self, name: str, total: int | None, clock: Clock) -> None:
        self.name = name
        self.finished = threading.Event()
        self.announced = False
        self._total, self._done = total, 0
        self._clock, self._started = clock, clock()

    def advance(self, count: int = 1) -> None:
        self._done += count

    def progress(self) -> str:
        """'rollout · 128/512 · 9.0 s · 27 s left'."""
        seconds, done = self._seconds(), self._done
        count = left = ""
        if self._total is not None:
            count = f"{done}/{self._total}"
            left = f"{duration(seconds * (self._total - done) / done)} left" if done else ""
        return joined([self.name, count, duration(seconds), left])

    def result(self) -> str:
        count = "" if self._total is None else f"{self._done} in "
        return f"{self.name} · done · {count}{duration(self._seconds())}"

    def _seconds(self) -> float:
        return self._clock() - self._started
