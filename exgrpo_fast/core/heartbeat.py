"""Signs of life from a worker to its supervisor, through a pipe: one line a beat, naming the phase.

The code that does the work calls `HEARTBEAT`: the trainer at each phase, the policy at each forward
pass, observers during generation, the reward pool at each verdict. The screen has no part in it.
Calls from other threads than the main one write nothing: they would go on while that one hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SECONDS_BETWEEN_BEATS = 0.1
_PR_SET_PDEATHSIG = 1


class Heartbeat:
    """Writes the innermost phase; outside of all it is 'start', from the second step on 'between'.

    Without a descriptor, where nobody supervises, nothing is written.
    """

    def __init__(self, descriptor: int | None = None) -> None:
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

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._write()
        try:
            yield
        finally:
            self._phases.pop()
            self._write()

    def begin_step(self, step: int) -> None:
        if self._step is not None:
            self._phases[0] = "between"
        self._step = step
        self._write()

    def beat(self) -> None:
        """A sign of progress; called as often as one likes."""
        if time.monotonic() - self._last >= SECONDS_BETWEEN_BEATS:
            self._write()

    def _write(self) -> None:
        if self._descriptor is None or threading.current_thread() is not threading.main_thread():
            return
        self._last = time.monotonic()
        # A full pipe means that the supervisor has beats to read yet, a broken one that it is gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, f"{self._phases[-1]}\n".encode())


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
