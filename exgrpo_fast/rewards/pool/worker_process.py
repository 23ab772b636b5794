"""A worker process as the trainer sees it: two pipes that never block, and a kill that never waits.

One JSON object per line in each direction; `worker.py` is the other end and says which. The process
leads a group of its own, so that the children of a reward die with it, and it gets an environment
without anybody's tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from exgrpo_fast.rewards.pool.jobs import Job

# Everything else, tokens of Hugging Face, W&B or a cloud above all, stays out of the workers.
_KEPT_ENVIRONMENT = (
    "PATH HOME USER LOGNAME TMPDIR TEMP TMP TZ LANG LANGUAGE SYSTEMROOT LD_LIBRARY_PATH "
    "PYTHONHOME VIRTUAL_ENV CONDA_PREFIX HF_HOME HF_HUB_OFFLINE TRANSFORMERS_OFFLINE"
).split()
_IS_WORKER = "EXGRPO_FAST_REWARD_WORKER"
_CHUNK_BYTES = 1 << 16


def inside_worker() -> bool:
    """Whether this process is itself a reward worker."""
    return bool(os.environ.get(_IS_WORKER))


class WorkerProcess:
    """A running worker, what it has been given, and since when the pool waits for it.

    `selector` reports it, with this object as data, when a pipe is ready.
    """

    def __init__(self, setup: Mapping[str, Any], selector: selectors.BaseSelector) -> None:
        self.process = subprocess.Popen(
            # -P: neither the current folder nor the script's shadows a module of the same name.
            [sys.executable, "-P", "-m", "exgrpo_fast.rewards.pool.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # own process group: killed as a whole, deaf to Ctrl-C
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._jobs, self._replies = self.process.stdin, self.process.stdout
        self._selector = selector
        self._incoming, self._outgoing = bytearray(), bytearray()
        self.ready = False
        self.jobs: deque[Job] = deque()  # unanswered, in the order they were sent
        self.waited_since = time.monotonic()  # its start, then its first unanswered job
        self.num_jobs = 0
        self.start_bytes = self.resident_bytes = 0
        for pipe in (self._jobs, self._replies):
            os.set_blocking(pipe.fileno(), False)
        selector.register(self._replies, selectors.EVENT_READ, self)
        self.write(json.dumps({**setup, "parent": os.getpid()}))

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs

    def write(self, message: str) -> None:
        """Send one message, as much of it as the pipe takes now; `flush` sends the rest."""
        self._outgoing += message.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes: a stopped worker must not stop the trainer."""
        try:
            while self._outgoing:
                written = os.write(self._jobs.fileno(), self._outgoing[:_CHUNK_BYTES])
                del self._outgoing[:written]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it is dead; the end of its replies says so, too
            self._outgoing.clear()
        registered = self._jobs in self._selector.get_map()
        if self._outgoing and not registered:
            self._selector.register(self._jobs, selectors.EVENT_WRITE, self)
        elif registered and not self._outgoing:
            self._selector.unregister(self._jobs)

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, perhaps none; None when the worker has ended."""
        try:
            data = os.read(self._replies.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return []
        if not data:
            return None
        self._incoming += data
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = bytearray(rest)
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """SIGKILL to the whole group, children of the reward included; it does not wait."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # not waited for yet: the id is still ours
        for pipe in (self._jobs, self._replies):
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
            pipe.close()


def _environment() -> dict[str, str]:
    kept = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
    kept |= {key: value for key, value in os.environ.items() if key.startswith("LC_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        _IS_WORKER: "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # the cores belong to the trainer
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # gmpy2 computes in C, where the soft timer cannot stop it.
        "SYMPY_GROUND_TYPES": "python",
        "MPMATH_NOGMPY": "1",
    }
