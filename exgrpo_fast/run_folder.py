"""The run directory: its lock, its fixed file names, and who may write into it.

config.yaml env.json metrics.jsonl run.log completions/ checkpoints/ report.html summary.json
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from exgrpo_fast.errors import UserError


class RunFolderError(UserError):
    """The folder cannot be used for this run, as one line to the user."""


class RunFolder:
    """Opens a run directory for exactly one process; the kernel drops the lock on any death."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """RunFolderError when the folder holds a run and `resume` is False, or is in use."""
        self.path = path
        self._log_handler: logging.Handler | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: TextIO = (path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"--out {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(f"--out {path}: another run is writing there") from None
        if self.metrics.exists() and not resume:
            raise RunFolderError(
                f"--out {path}: holds a run already; take another folder, or --resume auto"
            )

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    log = property(lambda self: self.path / "run.log")
    completions = property(lambda self: self.path / "completions")
    checkpoints = property(lambda self: self.path / "checkpoints")
    bad_batches = property(lambda self: self.path / "bad_batches")
    rollouts = property(lambda self: self.path / "rollouts")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Whole file or no file: written beside its name and renamed."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, self.path / name)

    def read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else {}

    def start_log(self) -> None:
        """Send everything logged by this package to run.log."""
        handler = logging.FileHandler(self.log, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log_handler = handler
        root = logging.getLogger("exgrpo_fast")
        root.setLevel(logging.INFO)
        root.addHandler(handler)

    def close(self) -> None:
        if self._log_handler:
            logging.getLogger("exgrpo_fast").removeHandler(self._log_handler)
            self._log_handler.close()
        self._lock.close()
