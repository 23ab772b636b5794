"""The screen on a terminal: a live region at the bottom, what leaves it scrolls above it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.core.types import Metrics
from exgrpo_fast.run.display import Advance, Row, Screen
from exgrpo_fast.run.display.columns import fitting_columns, header_text, row_text
from exgrpo_fast.run.display.formatting import (
    best_and_worst,
    duration,
    excerpt,
    number_of,
    percent,
    sparkline,
    verdict_line,
)
from exgrpo_fast.run.display.plain import PlainScreen
from exgrpo_fast.run.display.steps import Clock, StepLine, StepReader, evaluation_line


def make_screen(stream: TextIO | None = None) -> Screen:
    """A live screen on a terminal that can show one, plain lines elsewhere.

    NO_COLOR keeps the live screen and takes its colours, as no-color.org asks.
    """
    stream = sys.stdout if stream is None else stream
    on_terminal = bool(getattr(stream, "isatty", lambda: False)())
    can_draw = os.environ.get("TERM", "") not in {"dumb", "unknown"}
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    if not (on_terminal and can_draw and encoding == "utf8"):
        return PlainScreen(stream)
    no_color = bool(os.environ.get("NO_COLOR"))
    return RichScreen(Console(file=stream, highlight=False, no_color=no_color))


BAR_WIDTH = 28  # of the run and of a phase, on a terminal that has room
REWARD_TITLE = "   reward "
SKIPPED = "! update skipped"  # once; the mark is in the step's row


class RichScreen(Screen):
    """A live region (run, phases, latest steps); what leaves it scrolls, so that nothing is lost.

    Steps wait in the live table and move up into the scrollback as single lines, always before
    anything that came after them, so that the scrollback reads in the order of time.
    """

    ROWS = 8  # latest steps in the live table
    HEADER_EVERY = 40  # scrolled lines between two headers: about one screen
    REFRESH_SECONDS = 0.25  # a clock that lives, at under 1 % of a core
    SLOW_SECONDS = 2.0  # a phase that took longer leaves a line, the first time

    def __init__(self, console: Console | None = None, *, clock: Clock = time.monotonic) -> None:
        self.console = console or Console(highlight=False)
        self._reader = StepReader(clock)
        self._rows: tuple[StepLine, ...] = ()
        self._rewards: deque[float] = deque(maxlen=24)
        self._num_scrolled = 0
        self._known: set[str] = set()
        self._bar = BarColumn(BAR_WIDTH)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            self._bar,
            _Count(),
            _Elapsed(),
            console=self.console,
        )
        # rich's own refresh thread may draw between a print's erasing and its drawing, which
        # leaves torn copies of a region that changes its height: here one lock covers both.
        self._live = Live(self, console=self.console, auto_refresh=False, transient=True)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, name="screen", daemon=True)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        self._start()
        name = clean_line(name, max_line=60)
        task = self._progress.add_task(name, total=total)

        def advance(count: int = 1) -> None:
            self._progress.advance(task, count)

        try:
            yield advance
        finally:
            finished = next(t for t in self._progress.tasks if t.id == task)
            self._progress.remove_task(task)
        seconds = finished.elapsed or 0.0
        if name not in self._known and seconds > self.SLOW_SECONDS:
            count = f"{finished.completed:.0f} in " if total is not None else ""
            self._scroll(Text(f"{name} · {count}{duration(seconds)}", "dim"))
        self._known.add(name)

    def step(self, metrics: Metrics, *, total_steps: int) -> None:
        self._start()
        line = self._reader.read(metrics, total_steps)
        reward, evaluation = line.number("reward_mean"), evaluation_line(metrics)
        with self._lock:
            self._rows = (*self._rows, line)
            if reward is not None:
                self._rewards.append(reward)
            if line.skipped and SKIPPED not in self._known:
                self._known.add(SKIPPED)
                self._scroll(Text(SKIPPED, "yellow"), keep=1)
            if evaluation:
                self._scroll(Text(f"step {line.step} · {evaluation}", "bold cyan"))
            else:
                # Room is left for the run line, the phases and the header.
                self._scroll(keep=max(1, min(self.ROWS, self.console.height - 6)))

    def completions(self, rows: Sequence[Row]) -> None:
        if rows:
            self._scroll(_completion_panel(rows, width=self.console.width))

    def note(self, text: str) -> None:
        self._scroll(Text(clean_text(text)))

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._scroll()
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()

    # the live region, top to bottom

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._rows:
            parts.append(_run_text(self._rows[-1], self._rewards, width=self.console.width))
        if self._progress.tasks:
            # 46 columns are enough for the name, the count and the times of a phase.
            self._bar.bar_width = max(1, min(BAR_WIDTH, self.console.width - 46))
            parts.append(self._progress)
        if self._rows:
            columns = fitting_columns(self.console.width)
            parts += [header_text(columns), *(row_text(line, columns) for line in self._rows)]
        return Group(*parts)

    def _start(self) -> None:
        if not self._live.is_started and not self._closed.is_set():
            self._live.start()
            self._refresher.start()

    def _refresh(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that went away ends no run
            while not self._closed.wait(self.REFRESH_SECONDS):
                with self._lock:
                    if self._live.is_started:
                        self._live.refresh()

    # the scrollback

    def _scroll(self, *renderables: RenderableType, keep: int = 0) -> None:
        """Move all but the last `keep` rows into the scrollback, then what came after them."""
        with self._lock:
            parts = [*self._leaving_rows(keep), *renderables]
            if parts:
                with contextlib.suppress(OSError, ValueError):  # as above
                    self.console.print(Group(*parts))

    def _leaving_rows(self, keep: int) -> list[RenderableType]:
        cut = max(len(self._rows) - keep, 0)
        leaving, self._rows = self._rows[:cut], self._rows[cut:]
        columns, lines = fitting_columns(self.console.width), []
        for line in leaving:
            if self._num_scrolled % self.HEADER_EVERY == 0:
                lines.append(header_text(columns))
            lines.append(row_text(line, columns))
            self._num_scrolled += 1
        return lines


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Elapsed(ProgressColumn):
    """Elapsed time of a phase, and what is left of it when the total is known."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining if task.total else None
        tail = f" · {duration(left)} left" if left else ""
        return Text(duration(task.elapsed or 0.0) + tail, "dim")


def _run_text(last: StepLine, rewards: Sequence[float], *, width: int) -> Text:
    """How far the run is, when it ends and, where there is room, the curve of its reward."""
    share = min(last.step / last.total_steps, 1.0) if last.total_steps else 1.0
    name = f"step {last.step}/{last.total_steps} "
    figures = f" {percent(share)}" + ("" if last.eta is None else f" · eta {last.show_eta()}")
    bar = max(0, min(BAR_WIDTH, width - len(name) - len(figures)))
    full = round(bar * share)
    text = Text(no_wrap=True, overflow="ellipsis").append(name, "bold")
    text.append("━" * full, "cyan").append("━" * (bar - full), "bright_black")
    text.append(figures)
    room = width - len(text) - len(REWARD_TITLE)
    if len(rewards) > 1 and room >= 8:
        text.append(REWARD_TITLE, "dim")
        text.append(sparkline(rewards, min(24, room)), "cyan")
    return text


def _completion_panel(rows: Sequence[Row], *, width: int) -> Panel:
    """The best and the worst row of one group, side by side where there is room."""
    # Text, never markup: '[red]' in a completion is what the policy wrote, not a colour.
    shown = best_and_worst(rows)
    first = shown[0][1]
    facts = Table.grid(padding=(0, 2))
    facts.add_row(Text("question", "dim"), Text(excerpt(first.get("prompt", ""), limit=400)))
    facts.add_row(Text("answer", "dim"), Text(excerpt(first.get("answer", ""), limit=200)))
    sides: list[RenderableType] = []
    for name, row in shown:
        title = Text(f"{name} · {verdict_line(row)}", "green" if name == "best" else "yellow")
        sides.append(Group(title, Text(excerpt(row.get("completion", "")))))
    if width >= 120:
        beside = Table.grid(expand=True, padding=(0, 2))
        for _ in sides:
            beside.add_column(ratio=1)
        beside.add_row(*sides)
        sides = [beside]
    spaced = [part for side in sides for part in (Text(""), side)]
    step = number_of(first, "step")
    title = "completions" if step is None else f"completions of step {step:.0f}"
    return Panel(Group(facts, *spaced), title=title, border_style="dim")
