"""Signs of progress of this process: counted, and written to its supervisor, a line each.

The code that does the work calls `HEARTBEAT`: the trainer at each phase, the policy at each forward
pass, observers during generation, the reward pool at each verdict, collectives around their wait.
The screen has no part in it. A line, through a pipe, names the phase. Calls from other threads than
the main one count for nothing: they would go on while that one hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line, clean_text

SECONDS_BETWEEN_BEATS = 0.1
MESSAGE_BYTES, FRAMES_BYTES = 200, 1600  # as JSON in one write, which a pipe does not split
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """An exception that ended a worker. Equal steps and messages are the same failure."""

    step: int | None  # None: before the first one
    message: str  # one line, addresses of objects left out
    last_frames: str

    @staticmethod
    def of(error: Exception, step: int | None) -> Failure:
        message = re.sub(r"\b0x[0-9a-f]+", "0x...", f"{type(error).__name__}: {error}")
        frames = clean_text("".join(traceback.format_exception(error))).encode()
        return Failure(
            step,
            clean_line(message).encode()[:MESSAGE_BYTES].decode(errors="ignore"),
            frames[-FRAMES_BYTES:].decode(errors="ignore"),
        )

    def __str__(self) -> str:
        where = "before the first step" if self.step is None else f"at step {self.step}"
        return f"{self.message}, {where}"


class Heartbeat:
    """Writes the innermost phase; outside of all it is 'start', from the second step on 'between'.

    Without a descriptor, where no other process supervises, nothing is written.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.num_beats = 0
        self.is_waiting = False  # the main thread, for another rank
        self._phases = ["start"]
        self._last = 0.0
        self._step: int | None = None
        self._descriptor: int | None = None
        if descriptor is not None:
            self.connect(descriptor)

    def connect(self, descriptor: int | None) -> None:
        """Write to this pipe from now on."""
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_blocking(descriptor, False)
            self._write()

    @property
    def innermost_phase(self) -> str:
        return self._phases[-1]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._write()
        try:
            yield
        finally:
            self._phases.pop()
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective: silence inside is that of another rank."""
        if not _in_main_thread():
            yield
            return
        before, self.is_waiting = self.is_waiting, True
        try:
            yield
        finally:
            self.is_waiting = before
            self.beat()

    def begin_step(self, step: int) -> None:
        if self._step is not None:
            self._phases[0] = "between"
        self._step = step
        self._write()

    def beat(self) -> None:
        """A sign of progress; called as often as one likes."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN_BEATS:
            self._write()

    @contextlib.contextmanager
    def failures_reported(self, log: Callable[[str], None]) -> Iterator[None]:
        """Exit with 1 at an unexpected exception: the supervisor shows it, `log` gets it whole.

        Without a supervisor, and for a user's mistake, nothing changes.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self._descriptor is None:
                raise
            log("".join(traceback.format_exception(error)).rstrip())
            self._write(json.dumps(asdict(Failure.of(error, self._step)), ensure_ascii=False))
            raise SystemExit(1) from None

    def _write(self, line: str | None = None) -> None:
        if not _in_main_thread():
            return
        self._last = time.monotonic()
        self.num_beats += 1
        if self._descriptor is None:
            return
        # A full pipe means that the supervisor has beats to read yet, a broken one that it is gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, f"{line or self._phases[-1]}\n".encode())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


HEARTBEAT = Heartbeat()  # of this process


@dataclass(frozen=True)
class Supervised:
    """What a supervisor passes to its worker, as one word of the command line."""

    parent: int
    heartbeat: int  # descriptor of the pipe
    lock: int  # descriptor of the run folder's lock

    def __str__(self) -> str:
        return f"{self.parent},{self.heartbeat},{self.lock}"

    @staticmethod
    def parse(word: str) -> Supervised:
        return Supervised(*map(int, word.split(",")))

    def take_over(self) -> None:
        """Connect HEARTBEAT, end with the supervisor, and keep its descriptors from children."""
        die_with(self.parent)
        os.set_inheritable(self.heartbeat, False)
        os.set_inheritable(self.lock, False)
        HEARTBEAT.connect(self.heartbeat)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
