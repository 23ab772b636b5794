"""A screen whose every word is a sign of life as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from exgrpo_fast.core.heartbeat import Heartbeat
from exgrpo_fast.run.display.screen import Advance, Row, Screen
from exgrpo_fast.run.metrics import Metrics


class HeartbeatScreen:
    """Shows what `screen` shows, and beats at each phase, each advance and each step."""

    def __init__(self, screen: Screen, heartbeat: Heartbeat) -> None:
        self.screen = screen
        self._heartbeat = heartbeat

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        with self._heartbeat.phase(name), self.screen.phase(name, total) as advance:

            def advance_and_beat(count: int = 1) -> None:
                advance(count)
                self._heartbeat.beat()

            yield advance_and_beat

    def heartbeat(self) -> None:
        self._heartbeat.beat()

    def step(self, metrics: Metrics, *, total_steps: int) -> None:
        self._heartbeat.started()
        self.screen.step(metrics, total_steps=total_steps)

    def completions(self, rows: Sequence[Row]) -> None:
        self.screen.completions(rows)

    def note(self, text: str) -> None:
        self._heartbeat.beat()
        self.screen.note(text)

    def close(self) -> None:
        self.screen.close()
