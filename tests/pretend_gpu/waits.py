"""What made the host wait for the pretend GPU, and where the project asked for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OURS = Path(__file__).resolve().parent
ROOT = OURS.parents[1]


@dataclass(frozen=True)
class HostWait:
    """One point at which the host stands still until the stream is empty."""

    kind: str
    place: str  # file:line function, of the innermost frame of the repository

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


class SynchronizingOperation(RuntimeError):
    """A wait under `torch.cuda.set_sync_debug_mode("error")`."""


class Waits:
    """The log of one pretend GPU, in order."""

    def __init__(self) -> None:
        self.log: list[HostWait] = []
        self.raises = False

    def __len__(self) -> int:
        return len(self.log)

    def note(self, kind: str) -> None:
        wait = HostWait(kind, place_of_caller())
        self.log.append(wait)
        if self.raises:
            raise SynchronizingOperation(f"called a synchronizing CUDA operation: {wait}")

    def set_debug_mode(self, mode: int | str) -> None:
        """`torch.cuda.set_sync_debug_mode`: "error" or 2 raises at the next wait."""
        self.raises = mode in ("error", 2)

    @contextmanager
    def during(self) -> Iterator[Waits]:
        """A log of the block alone, filled when the block ends."""
        part, start = Waits(), len(self.log)
        try:
            yield part
        finally:
            part.log = self.log[start:]

    def at(self, text: str) -> list[HostWait]:
        """Those whose place holds `text`."""
        return [wait for wait in self.log if text in wait.place]

    def report(self) -> str:
        """One line a place, the most frequent first."""
        counts = Counter(map(str, self.log))
        lines = [f"{count:6d}  {wait}" for wait, count in counts.most_common()]
        return "\n".join([f"{len(self)} host waits", *lines])


def place_of_caller() -> str:
    """The innermost frame of the repository outside of the pretence, or of all where there is none."""
    frame, innermost = sys._getframe(1), None
    while frame is not None:
        path = frame.f_code.co_filename
        if not _is_pretence(path):
            innermost = innermost or frame
            if path.startswith(f"{ROOT}/") and "/.venv" not in path:
                innermost = frame
                break
        frame = frame.f_back
    assert innermost is not None
    path, code = innermost.f_code.co_filename, innermost.f_code
    return f"{path.removeprefix(f'{ROOT}/')}:{innermost.f_lineno} {code.co_name}"


@cache
def _is_pretence(path: str) -> bool:
    return Path(path).parent == OURS and not Path(path).name.startswith("test_")
