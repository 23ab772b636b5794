"""A cache of model folders, each filled once by one process and committed by one rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.model.folder_reading import PolicyError
from exgrpo_fast.run.display import Screen

DIGESTS = "digests.json"  # file name -> xxh3-128; written last
WAIT_SECONDS = 900.0  # for another process: a download of 100 MB and a conversion


def cache_root() -> Path:
    """$XDG_CACHE_HOME/exgrpo-fast, by default ~/.cache/exgrpo-fast."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "exgrpo-fast"


def fill_once(folder: Path, make: Callable[[Path], None], screen: Screen) -> Path:
    """`folder`, as `make` wrote it into an empty folder; a damaged one is made anew.

    Processes that ask at the same time wait for the one that makes it. Whatever `make` raises
    leaves nothing behind. PolicyError for a disk that refuses and for a wait that is too long.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, screen):
            if not is_whole(folder):  # made while this process waited
                _fill(folder, make, screen)
    except OSError as error:
        raise PolicyError(f"{folder}: {error.strerror or error}; XDG_CACHE_HOME moves it") from None
    return folder


def _fill(folder: Path, make: Callable[[Path], None], screen: Screen) -> None:
    if folder.exists():
        screen.note(f"{folder} is damaged: made anew")
        shutil.rmtree(folder)
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that died here
    unfinished.mkdir()
    try:
        make(unfinished)
        digests = {file.name: _digest(file) for file in sorted(unfinished.iterdir())}
        (unfinished / DIGESTS).write_text(json.dumps(digests, indent=2))
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Every file is there and holds what was written."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        return all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


@contextlib.contextmanager
def _alone(folder: Path, screen: Screen) -> Iterator[None]:
    """Hold the folder's lock, which the system releases with the process that holds it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    deadline = time.monotonic() + WAIT_SECONDS
    noted = False
    with screen.phase("wait for another process"):
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                if not noted:
                    screen.note(f"another process is making {folder}: waiting for it")
                noted = True
                HEARTBEAT.beat()
                if time.monotonic() > deadline:
                    raise PolicyError(
                        f"{folder}: another process has been making it for {WAIT_SECONDS:.0f} s; "
                        "end it and try again"
                    ) from None
    try:
        yield
    finally:
        lock.release()
