"""Rewards at arm's length: worker processes that may hang, crash or be killed, and are replaced.

`RewardPool.score` takes samples and returns one verdict for each, in order, whatever the reward
functions do. Each worker is given a few jobs at a time and answers them one by one; the clock of a
job starts when the answer before it arrived. When a worker misses the deadline its whole process
group is killed, that sample gets reward 0 with the reason `timeout`, and the jobs behind it go to
another worker. One selector loop does all of it; there is no thread, and nothing is shared but
pipes with JSON lines. A pool is used by one thread at a time.

Reasons a verdict can have, besides what the functions say: `timeout`, `error:<ExceptionName>`,
`worker_died`, `not_a_number`, `missing_column`, `unscored`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from exgrpo_fast.rewards.functions import BUILT_IN
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.references import check_reference

if TYPE_CHECKING:  # experience.py loads torch, which a reward alone does not need
    from exgrpo_fast.experience import Verdict

logger = logging.getLogger(__name__)

JOBS_PER_MESSAGE = 8  # fewer round trips; a killed worker hands at most 7 jobs back
JOBS_PER_WORKER = 5000  # then a fresh one, because SymPy's caches only grow
START_SECONDS = 60.0  # imports on a busy machine; 0.6 s when idle
DEATHS_PER_JOB = 3  # a worker may be killed by others; a job that kills three is guilty
SOFT_SHARE = 0.8  # the timer inside fires first: it costs no new worker
MEMORY_BUILT_IN = 1 << 30  # address space; math-verify stays below 300 MB
MEMORY_USER = 8 << 30  # a user's function may import torch

# Everything else, tokens of Hugging Face, W&B or a cloud above all, stays out of the workers.
_KEPT_ENVIRONMENT = (
    "PATH HOME USER LOGNAME TMPDIR TEMP TMP TZ LANG LANGUAGE SYSTEMROOT LD_LIBRARY_PATH "
    "PYTHONHOME VIRTUAL_ENV CONDA_PREFIX HF_HOME HF_HUB_OFFLINE TRANSFORMERS_OFFLINE"
).split()
_IS_WORKER = "EXGRPO_FAST_REWARD_WORKER"


class RewardSample(NamedTuple):
    """What one reward is asked about; `columns` are the other fields of the data row (JSON)."""

    prompt: str
    completion: str
    answer: str
    columns: Mapping[str, Any] = MappingProxyType({})


class Scored(NamedTuple):
    """A `Verdict` that needs no torch: same fields, same order."""

    reward: float
    reason: str = "ok"
    milliseconds: float = 0.0
    scored: bool = True
    checks: tuple[tuple[str, bool], ...] = ()


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # monotonic seconds; of its start, then of its first unanswered job
    ready: bool = False
    jobs: deque[int] = field(default_factory=deque)  # unanswered, in the order they were sent
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)
    num_jobs: int = 0

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs


@dataclass
class _Round:
    """One call of `run`: distinct jobs, what is known of them, and who waits for them."""

    messages: list[str]  # each job as a JSON array without its id
    samples: list[list[int]]  # job -> indices of the samples that it answers
    first_id: int
    waiting: deque[int] = field(default_factory=deque)
    deaths: dict[int, int] = field(default_factory=dict)
    results: dict[int, Scored] = field(default_factory=dict)
    num_samples_done: int = 0


class RewardPool:
    """Reward functions in killable processes.

    functions: names of built-in rewards, 'file.py:function', 'package.module:name', or functions
        that stand at the top level of a file. Several are added up with `weights` (default 1 each).
    timeout_seconds: for each function on each sample, before the worker is killed.
    memory_bytes: address space of a worker; default 1 GiB for built-in rewards, 8 GiB for others.
    RewardError, in one line, for a reward that cannot be found.
    """

    def __init__(
        self,
        functions: Sequence[str | Callable[..., Any]],
        *,
        weights: Sequence[float] | None = None,
        workers: int = 2,
        timeout_seconds: float = 5.0,
        memory_bytes: int | None = None,
    ) -> None:
        if os.environ.get(_IS_WORKER):
            raise RewardError(
                "a reward file starts a reward pool when it is imported; "
                "put the start of the run under `if __name__ == '__main__':`"
            )
        if isinstance(functions, str) or not functions:
            raise RewardError(
                f"reward functions: expected a list of at least one, got {functions!r}"
            )
        if weights is not None and len(weights) != len(functions):
            raise RewardError(f"{len(weights)} reward weights for {len(functions)} functions")
        if workers < 1 or timeout_seconds <= 0:
            raise RewardError(f"workers ({workers}) and timeout_seconds must be positive")
        self.functions = [check_reference(_as_reference(function)) for function in functions]
        self._weights = list(weights) if weights is not None else [1.0] * len(functions)
        self._max_workers = workers
        self._timeout = timeout_seconds
        built_in = all(reference in BUILT_IN for reference in self.functions)
        self._memory = memory_bytes or (MEMORY_BUILT_IN if built_in else MEMORY_USER)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._next_id = 0
        self._logged: set[tuple[str, str]] = set()
        self._last_detail = ""
        self._finalizer = weakref.finalize(
            self, _shut_down, self._workers, self._selector, os.getpid()
        )
        for _ in range(workers):  # early: they import while the model loads
            self._start_worker()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and wait for them; a second call does nothing."""
        self._finalizer()

    def score(
        self,
        samples: Sequence[RewardSample],
        on_finished: Callable[[int], object] = lambda count: None,
    ) -> list[Verdict]:
        """One verdict per sample, in order; `on_finished(count)` as they arrive.

        RewardError only when the functions can no longer be imported at all.
        """
        from exgrpo_fast.experience import Verdict

        return [Verdict(*scored) for scored in self.run(samples, on_finished=on_finished)]

    def check(self, sample: RewardSample | None = None) -> None:
        """Import the functions and call each once; RewardError in one line where one fails.

        With a real sample a column that a function asks for and the data lacks is found, too.
        """
        probe = sample or RewardSample("What is 1 + 1?", "\\boxed{2}", "2")
        scored = self.run([probe])[0]
        faults = ("error:", "timeout", "worker_died", "not_a_number", "missing_column")
        if sample is None:
            faults = faults[:-1]
        if scored.reason.startswith(faults):
            raise RewardError(self._last_detail or f"the reward failed: {scored.reason}")

    def run(
        self,
        samples: Sequence[RewardSample],
        *,
        checking_gold: bool = False,
        on_finished: Callable[[int], object] = lambda count: None,
    ) -> list[Scored]:
        """`score` without torch. `checking_gold` asks the functions about the answers instead."""
        if not self._finalizer.alive:
            raise RuntimeError("this RewardPool is closed")
        self._last_detail = ""
        work = self._distinct(samples, checking_gold)
        try:
            while len(work.results) < len(work.messages):
                self._dispatch(work)
                for worker in self._ready_workers():
                    done = work.num_samples_done
                    self._receive(worker, work)
                    if work.num_samples_done > done:
                        on_finished(work.num_samples_done - done)
                self._kill_late(work)
        except BaseException:  # Ctrl-C above all: nobody will read what these are working on
            for worker in [w for w in self._workers if w.jobs]:
                self._remove(worker)
            raise
        verdicts: list[Scored] = [Scored(0.0)] * len(samples)
        for job, indices in enumerate(work.samples):
            for index in indices:
                verdicts[index] = work.results[job]
        return verdicts

    def _distinct(self, samples: Sequence[RewardSample], checking_gold: bool) -> _Round:
        """Equal samples become one job: the K responses of an easy question are often the same."""
        jobs: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            columns = dict(sample.columns)
            parts = [sample.prompt, sample.completion, sample.answer, columns, checking_gold]
            jobs.setdefault(json.dumps(parts, default=str)[1:], []).append(index)
        work = _Round(list(jobs), list(jobs.values()), self._next_id, deque(range(len(jobs))))
        self._next_id += len(jobs)
        return work

    # --- sending ----------------------------------------------------------------------------------

    def _dispatch(self, work: _Round) -> None:
        for worker in [w for w in self._workers if w.idle and w.num_jobs >= JOBS_PER_WORKER]:
            self._remove(worker)
        wanted = min(self._max_workers, len(work.messages) - len(work.results))
        while len(self._workers) < wanted:
            self._start_worker()
        for worker in self._workers:
            if worker.idle and work.waiting:
                # The last jobs are spread over all workers rather than queued behind one.
                share = -(-len(work.waiting) // self._max_workers)
                self._send(worker, work, min(JOBS_PER_MESSAGE, share))

    def _send(self, worker: _Worker, work: _Round, num_jobs: int) -> None:
        jobs = [work.waiting.popleft() for _ in range(num_jobs)]
        lines = [f"[{work.first_id + job}, {work.messages[job]}" for job in jobs]
        worker.jobs.extend(jobs)
        worker.num_jobs += num_jobs
        worker.deadline = self._deadline()
        self._write(worker, f'{{"jobs": [{", ".join(lines)}]}}\n'.encode())

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout * len(self.functions)

    def _write(self, worker: _Worker, data: bytes) -> None:
        worker.outgoing += data
        self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        """Write what the pipe takes now: a stopped worker must not stop the trainer."""
        pipe = worker.process.stdin
        assert pipe is not None
        try:
            while worker.outgoing:
                written = os.write(pipe.fileno(), worker.outgoing[: 1 << 16])
                del worker.outgoing[:written]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it is dead; the end of its replies says so, too
            worker.outgoing.clear()
        registered = pipe in self._selector.get_map()
        if worker.outgoing and not registered:
            self._selector.register(pipe, selectors.EVENT_WRITE, worker)
        elif registered and not worker.outgoing:
            self._selector.unregister(pipe)

    # --- receiving --------------------------------------------------------------------------------

    def _ready_workers(self) -> list[_Worker]:
        """Wait for replies, at most until the next deadline; flush what can be written."""
        busy = [worker for worker in self._workers if worker.jobs or not worker.ready]
        until = min((worker.deadline for worker in busy), default=time.monotonic())
        readable: list[_Worker] = []
        for key, events in self._selector.select(max(0.0, until - time.monotonic())):
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            else:
                readable.append(key.data)
        return readable

    def _receive(self, worker: _Worker, work: _Round) -> None:
        pipe = worker.process.stdout
        assert pipe is not None
        data = os.read(pipe.fileno(), 1 << 16)
        if not data:
            self._bury(worker, work)
            return
        worker.incoming += data
        *lines, rest = worker.incoming.split(b"\n")
        worker.incoming = bytearray(rest)
        for line in lines:
            reply = json.loads(line)
            if "id" in reply:
                job = worker.jobs.popleft()
                assert reply["id"] == work.first_id + job
                self._settle(work, job, self._combine(reply))
                worker.deadline = self._deadline()
            elif "failed" in reply:
                raise RewardError(reply["failed"])
            else:
                worker.ready, self._failed_starts = True, 0

    def _combine(self, reply: Mapping[str, Any]) -> Scored:
        """The weighted sum; None does not count; the reason of the first that is not ok."""
        total, reasons, counted = 0.0, [], False
        for name, weight, result in zip(
            self.functions, self._weights, reply["results"], strict=True
        ):
            reward, reason, detail = result
            if detail:
                self._log_once(name, reason, detail)
            if reward is not None:
                total, counted = total + weight * reward, True
                reasons.append(reason)
        if not counted:
            return Scored(0.0, "unscored", reply["ms"], scored=False)
        return Scored(total, next((r for r in reasons if r != "ok"), "ok"), reply["ms"])

    def _settle(self, work: _Round, job: int, scored: Scored) -> None:
        work.results[job] = scored
        work.num_samples_done += len(work.samples[job])

    def _log_once(self, name: str, reason: str, detail: str) -> None:
        name = Path(name).name
        self._last_detail = f"reward {name}: {detail}"
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
            logger.warning(
                "reward %s: %s; counted as %s, and further ones only counted", name, detail, reason
            )

    # --- birth and death --------------------------------------------------------------------------

    def _start_worker(self) -> None:
        process = subprocess.Popen(
            # -P: neither the current folder nor the script's shadows a module of the same name.
            [sys.executable, "-P", "-m", "exgrpo_fast.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # own process group: killed as a whole, deaf to Ctrl-C
            bufsize=0,
        )
        assert process.stdin is not None and process.stdout is not None
        worker = _Worker(process, deadline=time.monotonic() + START_SECONDS)
        os.set_blocking(process.stdin.fileno(), False)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        setup = {
            "functions": self.functions,
            "memory_bytes": self._memory,
            "soft_seconds": self._timeout * SOFT_SHARE,
            "parent": os.getpid(),
        }
        self._write(worker, json.dumps(setup).encode() + b"\n")

    def _kill_late(self, work: _Round) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline < now and (w.jobs or not w.ready)]:
            if self._has_reply(worker):
                continue  # it answered while we were away
            self._remove(worker)
            if worker.jobs:
                job = worker.jobs.popleft()
                milliseconds = self._timeout * len(self.functions) * 1000
                self._log_once(self._names, "timeout", "killed at the time limit")
                self._settle(work, job, Scored(0.0, "timeout", milliseconds))
                self._requeue(worker, work)
            else:
                self._count_failed_start(f"not ready after {START_SECONDS:g} s")

    def _has_reply(self, worker: _Worker) -> bool:
        ready = self._selector.select(0)
        return any(key.data is worker and events & selectors.EVENT_READ for key, events in ready)

    def _bury(self, worker: _Worker, work: _Round) -> None:
        """A worker is gone without our doing: its job is tried again, it may be innocent."""
        self._remove(worker)
        if not worker.ready:
            self._count_failed_start(f"ended with exit code {worker.process.returncode}")
            return
        if worker.jobs:
            job = worker.jobs[0]
            work.deaths[job] = work.deaths.get(job, 0) + 1
            if work.deaths[job] >= DEATHS_PER_JOB:
                worker.jobs.popleft()
                how = f"ended the worker (exit code {worker.process.returncode})"
                self._log_once(self._names, "worker_died", how)
                self._settle(work, job, Scored(0.0, "worker_died"))
        self._requeue(worker, work)

    @property
    def _names(self) -> str:
        return ", ".join(Path(reference).name for reference in self.functions)

    def _requeue(self, worker: _Worker, work: _Round) -> None:
        work.waiting.extendleft(reversed(worker.jobs))
        worker.jobs.clear()

    def _count_failed_start(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= DEATHS_PER_JOB:
            self._failed_starts = 0
            raise RewardError(f"the reward worker does not start ({self._names}): it {how}")

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _kill(worker, self._selector)


def _shut_down(workers: list[_Worker], selector: selectors.BaseSelector, owner: int) -> None:
    if os.getpid() != owner:  # a forked child ends; the workers are its parent's
        return
    for worker in workers:
        _kill(worker, selector)
    workers.clear()
    selector.close()


def _kill(worker: _Worker, selector: selectors.BaseSelector) -> None:
    """SIGKILL to the whole group, children of the reward included, and no zombie left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)  # not yet waited for: the id is still ours
    for pipe in (worker.process.stdin, worker.process.stdout):
        assert pipe is not None
        if pipe in selector.get_map():
            selector.unregister(pipe)
        pipe.close()
    worker.process.wait()


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


# --- functions handed over as objects -------------------------------------------------------------


def _as_reference(function: str | Callable[..., Any]) -> str:
    """A function -> the reference under which a worker can import it; strings stay."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", None)
    if not inspect.isfunction(function) or name is None:
        raise RewardError(
            f"reward {function!r} is a {type(function).__name__}: a worker process imports rewards "
            "by name, so write a function at the top level of a file"
        )
    if name == "<lambda>" or "<locals>" in name or "." in name:
        kind = "a lambda" if "<lambda>" in name else "not at the top level of its file"
        raise RewardError(
            f"reward '{name}' is {kind}: a worker process imports rewards by name, so define it "
            "with `def` at the top level of a file and hand it over again"
        )
    for built_in_name, built_in in BUILT_IN.items():
        if function is built_in:
            return built_in_name
    module = sys.modules.get(function.__module__)
    file = inspect.getsourcefile(function)
    if _in_regular_package(function.__module__):
        return f"{function.__module__}:{name}"  # its relative imports need the package
    if file is None or module is None or not Path(file).is_file():
        raise RewardError(
            f"reward '{name}' has no source file (typed into a prompt?): save it in one"
        )
    if getattr(module, name, function) is not function:
        raise RewardError(f"reward '{name}' is hidden by another object of that name in {file}")
    return f"{file}:{name}"


def _in_regular_package(module_name: str) -> bool:
    root, _, rest = module_name.partition(".")
    return bool(rest) and getattr(importlib.import_module(root), "__file__", None) is not None
