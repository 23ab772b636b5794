"""Signs of life from a worker to its supervisor, through a pipe: one line a beat, naming the phase.

They are beaten by the main thread alone: one from a thread of its own would go on while the main
thread hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

SECONDS_BETWEEN_BEATS = 0.1
_PR_SET_PDEATHSIG = 1


class Heartbeat:
    """Writes the innermost phase; outside of all, 'start' and from the first step on 'between'."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._phases = ["start"]
        self._last = 0.0
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

    def started(self) -> None:
        """The first step is behind the run."""
        self._phases[0] = "between"
        self._write()

    def beat(self) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_BEATS:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        # A full pipe means that the supervisor has beats to read yet, a broken one that it is gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, f"{self._phases[-1]}\n".encode())


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

    def take_over(self) -> Heartbeat:
        """Live no longer than the supervisor, and keep its descriptors from children."""
        die_with(self.parent)
        os.set_inheritable(self.heartbeat, False)
        os.set_inheritable(self.lock, False)
        return Heartbeat(self.heartbeat)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
