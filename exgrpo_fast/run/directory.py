"""The run directory: its lock, its file names, and files that are whole or not there.

config.yaml env.json metrics.jsonl run.log completions/ checkpoints/ report.html summary.json
rollouts/ bad_batches/ updates/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from exgrpo_fast.core.errors import UserError


class RunFolderError(UserError):
    """The folder cannot be used for this run, as one line to the user."""


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps with a checkpoint folder, whole or not, oldest first."""
    names = (path.name.removeprefix("step_") for path in checkpoints.glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


class RunFolder:
    """Opens a run directory for exactly one run; the kernel drops the lock on any death."""

    def __init__(self, path: Path, *, resume: bool, lock: int | None = None) -> None:
        """RunFolderError when the folder holds a run and `resume` is False, or is in use.

        `lock`: the descriptor of the lock that a supervisor holds already. It is free again when
        both have ended.
        """
        self.path = path
        self._log_handler: logging.Handler | None = None
        self._lock = _take_lock(path) if lock is None else os.fdopen(lock, "r+")
        if self.metrics.exists() and not resume:
            raise RunFolderError(
                f"--out {path}: holds a run already; take another folder, or --resume auto"
            )
        for file in (self.config, self.metrics, self.log):
            if file.is_dir():
                raise RunFolderError(f"{file}: is a folder, and a run has a file there")

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    log = property(lambda self: self.path / "run.log")
    completions = property(lambda self: self.path / "completions")
    checkpoints = property(lambda self: self.path / "checkpoints")
    bad_batches = property(lambda self: self.path / "bad_batches")
    rollouts = property(lambda self: self.path / "rollouts")
    updates = property(lambda self: self.path / "updates")

    @property
    def lock_descriptor(self) -> int:
        return self._lock.fileno()

    def newest_step(self) -> int | None:
        """Of the newest checkpoint folder, whole or not."""
        return max(checkpoint_steps(self.checkpoints), default=None)

    def checkpoint_of(self, resume: str) -> Path | None:
        """The checkpoint of `--resume STEP`; None for auto and never. RunFolderError for other words
        and for a step without one."""
        steps = [str(step) for step in checkpoint_steps(self.checkpoints)]
        if resume not in ("auto", "never", *steps):
            raise RunFolderError(
                f"--resume {resume}: expected auto, never or one of the steps: "
                f"{', '.join(steps) or 'none'}"
            )
        return self.checkpoints / f"step_{resume}" if resume in steps else None

    def write_text(self, name: str, text: str) -> None:
        with whole_file(self.path / name, durable=True) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """RunFolderError for a file that is damaged."""
        file = self.path / name
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise RunFolderError(f"{file}: {error}; remove it, and it is written anew") from None

    def start_log(self) -> None:
        """Send everything logged by this package to run.log."""
        try:
            handler = _LogFile(self.log, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise RunFolderError(f"{self.log}: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log_handler = handler
        root = logging.getLogger("exgrpo_fast")
        root.setLevel(logging.INFO)
        root.addHandler(handler)

    def append_to_log(self, text: str) -> None:
        """A line from a process that has no log open."""
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        if self._log_handler:
            logging.getLogger("exgrpo_fast").removeHandler(self._log_handler)
            self._log_handler.close()
        self._lock.close()


class GuestFolder(RunFolder):
    """The run directory on ranks other than 0, which write nothing into it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_text(self, name: str, text: str) -> None:
        pass

    def start_log(self) -> None:
        pass

    def append_to_log(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _LogFile(logging.FileHandler):
    """A full disk costs lines of the log, and neither the run nor its screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of the lines that still wait in its buffer
            super().close()


def _take_lock(path: Path) -> TextIO:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise RunFolderError(f"--out {path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunFolderError(
            f"--out {path}: another run is writing there ({_owner_of(lock)})"
        ) from None
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    return lock


def is_written(path: Path) -> bool:
    """Whether a live process holds the lock of the run directory; changes nothing.

    To try the lock could make a run that starts at this moment fail. /proc/locks says it for certain;
    without it the process that is named in the lock file decides, where it is of this host.
    """
    try:
        owner, inode = (path / ".lock").read_text(), (path / ".lock").stat().st_ino
    except (OSError, ValueError):
        return False
    try:
        with open("/proc/locks") as table:  # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:2523196 0 EOF
            held = [line.split() for line in table if "FLOCK" in line]
    except OSError:
        words = owner.split()
        return len(words) == 4 and words[3] == socket.gethostname() and not _is_dead(words[1])
    return any(fields[-3].rpartition(":")[2] == str(inode) for fields in held)


def _owner_of(lock: TextIO) -> str:
    """'process 123 on host', which the owner writes just after it has taken the lock."""
    owner = ""
    for _ in range(20):
        lock.seek(0)
        owner = lock.read(200).strip()
        if owner:
            # The previous owner's name, which the present one has not replaced yet?
            _, number, _, host = owner.split(" ", 3)
            if host != socket.gethostname() or not _is_dead(number):
                return owner
        time.sleep(0.05)
    return owner or "unknown"


def _is_dead(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` where the block ends without an error.

    `durable`: the content survives a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
