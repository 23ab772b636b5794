"""Supervises a training run from another process, which loads no torch and cannot hang.

A worker that dies or stops beating (`core/heartbeat.py`) is restarted from its newest checkpoint. A user's
mistake, broken numbers, a disk that refuses and a signal end the run with the worker's own exit code,
and so does an exception that comes a second time at the same step with the same message.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from types import FrameType

from exgrpo_fast.core.heartbeat import Failure, Supervised
from exgrpo_fast.run.directory import RunFolder

EXIT_GAVE_UP = 75
FINAL_CODES = {0, 2, 70, 74}
MAX_RESTARTS = 3  # in a row without a new checkpoint
SECONDS_TO_DUMP = 10.0  # between SIGABRT, which writes the stacks into run.log, and SIGKILL
DEADLINE_SECONDS = 300.0
# Phases that may be silent for longer, as multiples of the deadline: downloads and loading; a slow
# disk; a judge that is asked again and again.
PATIENCE = {"start": 6.0, "save": 2.0, "between": 2.0, "reward": 2.0}
MEDIANS = 10.0  # a phase is also allowed so many times its own median silence

Command = Callable[
    [Supervised, bool], Sequence[str]
]  # (the worker's descriptors, whether to resume) -> words


class Deadlines:
    """Seconds that a phase may go without a beat: a minimum, or ten times its median gap so far."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._gaps: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))

    def seen(self, phase: str, gap: float) -> None:
        self._gaps[phase].append(gap)

    def of(self, phase: str) -> float:
        usual = median(self._gaps[phase]) if self._gaps[phase] else 0.0
        return max(self._seconds * PATIENCE.get(phase, 1.0), MEDIANS * usual)


class Supervisor:
    """Runs `command` until it ends for good; the caller's `folder` stays locked meanwhile."""

    def __init__(
        self, command: Command, folder: RunFolder, *, deadline: float = DEADLINE_SECONDS
    ) -> None:
        self.command = command
        self.folder = folder
        self.deadline = deadline
        self.worker: subprocess.Popen[bytes] | None = None
        self.signals: list[int] = []
        self.phase = "start"
        self.failure: Failure | None = None  # of the present worker, as it reported

    def run(self) -> int:
        """The exit code of the run: the worker's, 128 + a signal's, or 75."""
        restarts, newest = 0, self.folder.newest_step()
        seen: set[tuple[int | None, str]] = set()
        with self._forwarded_signals():
            code = self._run_worker(resume=False)
            while not self.signals and code not in FINAL_CODES:
                restarts = restarts + 1 if self.folder.newest_step() == newest else 1
                newest = self.folder.newest_step()
                what = f"the run ended in phase {self.phase} ({describe(code)})"
                if failure := self.failure:
                    what = f"the run ended with {failure}"
                    if (failure.step, failure.message) in seen:
                        self._report(
                            f"{what} again; it is not restarted, run.log has the tracebacks"
                        )
                        return code
                    seen.add((failure.step, failure.message))
                    print(failure.last_frames.rstrip(), file=sys.stderr)
                if restarts > MAX_RESTARTS:
                    self._report(
                        f"{what}; gave up after {MAX_RESTARTS} restarts without a checkpoint"
                    )
                    return EXIT_GAVE_UP
                where = f"step {newest}" if newest is not None else "the beginning"
                self._report(f"{what}; restart {restarts} of {MAX_RESTARTS} from {where}")
                code = self._run_worker(resume=True)
        return 128 + self.signals[0] if self.signals and code not in FINAL_CODES else code

    def _run_worker(self, *, resume: bool) -> int:
        """Start a worker and wait for its end; its exit code, negative for a signal."""
        reader, writer = os.pipe()
        supervised = Supervised(os.getpid(), writer, self.folder.lock_descriptor)
        self.phase, self.failure = "start", None
        try:
            self.worker = subprocess.Popen(
                self.command(supervised, resume),
                process_group=0,
                pass_fds=(writer, self.folder.lock_descriptor),
            )
            os.close(writer)
            if self.signals:  # one that came before the worker
                self._send(signal.SIGTERM)
            self._watch(reader)
            return self.worker.wait()
        finally:
            os.close(reader)
            self._send(signal.SIGKILL)  # children that the worker has left behind
            if sys.stdout.isatty():
                print("\033[?25h", end="", flush=True)  # the cursor, which a live screen hides

    def _watch(self, reader: int) -> None:
        """Returns when the worker has ended, or was stopped after a deadline."""
        deadlines = Deadlines(self.deadline)
        last = time.monotonic()
        while True:
            allowed = deadlines.of(self.phase)
            asked = time.monotonic()
            ready, _, _ = select.select([reader], [], [], min(1.0, allowed / 4))
            now = time.monotonic()
            if now - asked > 10.0:  # this process was stopped, and its worker perhaps with it
                last = now
            if ready:
                beats = os.read(reader, 1 << 16)
                if not beats:
                    return
                deadlines.seen(self.phase, now - last)
                last = now
                for line in beats.decode().split("\n")[:-1]:
                    if line.startswith("{"):
                        self.failure = Failure(**json.loads(line))
                    else:
                        self.phase = line
            elif now - last > allowed:
                self._stop_hanging_worker(now - last)
                return

    def _stop_hanging_worker(self, silence: float) -> None:
        assert self.worker is not None
        state = _state_of(self.worker.pid)
        self._report(
            f"no sign of life for {silence:.0f} s in phase {self.phase} ({state}): stopped"
        )
        self.worker.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.worker.wait(SECONDS_TO_DUMP)
        self._send(signal.SIGKILL)

    @contextlib.contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        """SIGINT is forwarded as SIGTERM, whose default ends a worker that has no handler yet."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.signals.append(number)
            self._send(signal.SIGTERM if len(self.signals) <= 2 else signal.SIGKILL)

        def pause(number: int, frame: FrameType | None) -> None:
            self._send(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._send(signal.SIGCONT)

        handlers = {signal.SIGTERM: forward, signal.SIGINT: forward, signal.SIGTSTP: pause}
        previous = {number: signal.signal(number, h) for number, h in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _send(self, number: int) -> None:
        """A signal to the worker's process group."""
        if self.worker is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.worker.pid, number)

    def _report(self, text: str) -> None:
        """On the screen and in run.log."""
        print(f"exgrpo-fast: {text}", file=sys.stderr, flush=True)
        self.folder.append_to_log(f"SUPERVISOR {text}")


def describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _state_of(pid: int) -> str:
    """'T (stopped)', 'D (disk sleep)', ...: the state of a process in /proc."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(line.split("\t")[1].strip() for line in file if line.startswith("State:"))
    except (OSError, StopIteration):
        return "state unknown"
