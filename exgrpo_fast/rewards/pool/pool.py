"""Reward functions in worker processes that may hang, crash or be killed, and are replaced.

A pool takes samples and gives one verdict for each, in order, whatever the reward functions do.
`score` waits for them. While something else goes on, `submit` hands samples in, `poll` moves things
along without ever waiting, and `finish` or `verdicts` waits for what is left:

    future = pool.submit(first_samples)
    while generating:
        pool.submit(more_samples, append_to=future)
        pool.poll()
    verdicts = pool.verdicts(future)

A reward that is `per_group` gets all completions of a question in one call: its samples wait until
the future is complete.

Each worker is given a few jobs at a time and answers them one by one; the clock of a job starts
when the answer before it arrived. When a worker misses the deadline its whole process group is
killed, that sample gets reward 0 with the reason `timeout`, and the jobs behind it go to a spare
worker that has done its imports already. There is no thread, and nothing is shared but pipes with
JSON lines. A pool is used by one thread at a time.

Reasons a verdict can have, besides what the functions say: `timeout`, `error:<ExceptionName>`,
`worker_died`, `not_a_number`, `missing_column`, `unscored`, `cancelled`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.types import RewardSample, Verdict
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.loading import REWARDS, as_reference, check_reference
from exgrpo_fast.rewards.pool.jobs import FAULTS, Job, ScoreFuture, refuse_failing_reward
from exgrpo_fast.rewards.pool.worker_process import WorkerProcess, inside_worker
from exgrpo_fast.rewards.rubrics.rubrics import RubricText

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02  # of work in one `poll`, which may start one more thing before it looks again
JOBS_PER_MESSAGE = 8  # fewer round trips; a killed worker hands at most 7 jobs back
CHARS_PER_MESSAGE = 1 << 18  # or fewer jobs, because a message is built in one go
START_SECONDS = 60.0  # imports on a busy machine; 0.6 s when idle
CRASHES_PER_JOB = 3  # others may kill a worker; a job that three have ended with is given up
SOFT_SHARE = 0.8  # the timer inside fires first: it costs no new worker
TIE = 1e-6  # rewards that differ by rounding
HARD_PER_SOFT = 2.0  # for a reward with a time limit of its own

# A worker is replaced when it is worn, because SymPy's caches only grow.
WORN_JOBS = 5000
WORN_BYTES = 140 << 20  # resident, above its start; 200 MB with math-verify
MEMORY_BUILT_IN = 512 << 20  # address space; math-verify starts with 63 MB, reasoning-gym with 195
MEMORY_USER = 8 << 30  # a user's function may import torch


class RewardPool:
    """Reward functions in killable processes.

    functions: names of built-in rewards, 'file.py:function', 'package.module:name', or functions
        that stand at the top level of a file. Several are added up with `weights` (default 1 each).
    workers: how many work at the same time; one more is in reserve.
    timeout_seconds: for each function on each sample, before the worker is killed. A built-in
        reward may have a tighter limit: 2 s for `math_verify`.
    memory_bytes: address space of a worker; default 512 MiB for built-in rewards, 8 GiB for others.
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
        if inside_worker():
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
        self.functions = [check_reference(as_reference(function)) for function in functions]
        self._weights = list(weights) if weights is not None else [1.0] * len(functions)
        self.rubrics: dict[str, RubricText] = {}  # by name; known once a worker has started
        self._max_busy = workers
        self._soft_seconds = timeout_seconds * SOFT_SHARE
        self._hard_seconds = sum(_hard_seconds(f, timeout_seconds) for f in self.functions)
        built_in = all(reference in REWARDS for reference in self.functions)
        self._memory = memory_bytes or (MEMORY_BUILT_IN if built_in else MEMORY_USER)
        self._worn_bytes = WORN_BYTES if built_in else self._memory // 2
        self._selector = selectors.DefaultSelector()
        # Whether a function is; known once a worker has started
        self._per_group: bool | None = None
        self._unsent: list[ScoreFuture] = []  # with samples that are no jobs yet
        self._waiting: deque[Job] = deque()
        self._workers: list[WorkerProcess] = []
        self._killed: list[WorkerProcess] = []  # not yet out of the system's table
        self._failed_starts = 0
        self._logged: set[tuple[str, str]] = set()
        self.fault = ""  # the last error of a function, in a line
        self._is_trying = False  # `check` raises what is wrong, and a probe may well fail
        self._finalizer = weakref.finalize(
            self, _shut_down, self._workers, self._killed, self._selector, os.getpid()
        )
        for _ in range(workers):  # early: they import while the model loads
            self._start_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and wait for their end; a second call does nothing."""
        self._finalizer()

    # --- all at once ------------------------------------------------------------------------------

    def score(
        self,
        samples: Sequence[RewardSample],
        on_finished: Callable[[int], object] = lambda count: None,
        *,
        checking_gold: bool = False,
    ) -> list[Verdict]:
        """One verdict per sample, in order; `on_finished(count)` as they arrive.

        `checking_gold` asks the functions about the answers instead. RewardError only when they can
        no longer be imported at all.
        """
        return self.verdicts(self.submit(samples, checking_gold=checking_gold), on_finished)

    def check(self, *samples: RewardSample) -> None:
        """Import the functions and call each; RewardError in one line where one fails on all.

        With real samples a column that a function asks for and the data lacks is found, too.
        """
        self.fault, self._is_trying = "", True
        try:
            found = self.score(samples or [RewardSample("What is 1 + 1?", "\\boxed{2}", "2")])
        finally:
            self._is_trying = False
        faults = FAULTS if samples else FAULTS[:-1]
        if all(scored.reason.startswith(faults) for scored in found):
            hint = ""
            if "string indices must be integers" in self.fault:  # `completion[0]["content"]`
                hint = "; completions are texts, not lists of messages"
            raise RewardError(f"{self.fault or f'the reward failed: {found[0].reason}'}{hint}")

    # --- while something else goes on -------------------------------------------------------------

    def submit(
        self,
        samples: Sequence[RewardSample],
        *,
        append_to: ScoreFuture | None = None,
        checking_gold: bool = False,
    ) -> ScoreFuture:
        """Hand samples in, and return the future that collects their verdicts, in order.

        `append_to`: add them to an earlier one. Within a future equal samples are scored once.
        Never waits; costs what `poll` costs, and 3 us per 1,000 characters.
        """
        future = ScoreFuture(checking_gold) if append_to is None else append_to
        future.add(samples)
        if future not in self._unsent:
            self._unsent.append(future)
        self.poll()
        return future

    def poll(self) -> None:
        """Send, receive, kill and replace what can be at once: at most 50 ms, never waiting.

        The workers have a few jobs each, so that a call now and then keeps them busy. RewardError
        when they do not start.
        """
        self._check_open()
        end = time.monotonic() + POLL_SECONDS
        while self._turn(wait=False) and time.monotonic() < end:
            pass

    def verdicts(
        self, future: ScoreFuture, on_finished: Callable[[int], object] = lambda count: None
    ) -> list[Verdict]:
        """Wait for the rest of a future; `on_finished(count)` first for what is there already.

        An exception, Ctrl-C above all, cancels the future.
        """
        self._check_open()
        future.complete = True
        num_reported = 0
        try:
            while True:
                if future.num_done > num_reported:
                    HEARTBEAT.beat()
                    on_finished(future.num_done - num_reported)
                    num_reported = future.num_done
                if future.done:
                    return [scored for scored in future.verdicts if scored is not None]
                self._turn(wait=True)
        except BaseException:
            self.cancel(future)
            raise

    def refuse_faults(self, verdicts: Sequence[Verdict]) -> None:
        """RewardError where nearly all verdicts are errors of the reward itself."""
        refuse_failing_reward(verdicts, self.fault)

    def cancel(self, future: ScoreFuture) -> None:
        """Cancel what a future still lacks; it is unscored with reason `cancelled`.

        Workers that have begun with it are killed.
        """
        for worker in [w for w in self._workers if any(job.future is future for job in w.jobs)]:
            self._remove(worker)
            self._requeue(worker)
        self._waiting = deque(job for job in self._waiting if job.future is not future)
        self._unsent = [other for other in self._unsent if other is not future]
        future.cancel()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this RewardPool is closed")

    # --- one turn ---------------------------------------------------------------------------------

    def _turn(self, *, wait: bool) -> bool:
        """Do once what can be done; True where there was something. `wait`: until there is."""
        self._killed[:] = [worker for worker in self._killed if worker.process.poll() is None]
        self._replace_worn()
        started = self._start_missing()
        self._take_jobs()
        self._dispatch()
        seconds = 0.0
        if wait and not started:
            waited = [self._deadline(w) for w in self._workers if w.jobs or not w.ready]
            seconds = max(0.0, min(waited, default=0.0) - time.monotonic())
        events = self._selector.select(seconds)
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
            elif key.data in self._workers:
                self._receive(key.data)
        killed = self._kill_late()
        return bool(started or events or killed)

    def _take_jobs(self) -> None:
        """What was handed in becomes jobs as soon as a worker has said how: one by one or grouped."""
        if self._per_group is None:
            return
        for future in self._unsent:
            grouped = self._per_group and not future.checking_gold
            if future.complete or not grouped:
                self._waiting += future.take_jobs(per_group=grouped)
        self._unsent = [future for future in self._unsent if future.unsent]

    def _deadline(self, worker: WorkerProcess) -> float:
        seconds = START_SECONDS
        if worker.ready:
            seconds = self._hard_seconds * (len(worker.jobs[0].samples) if worker.jobs else 1)
        return worker.waited_since + seconds

    def _dispatch(self) -> None:
        num_free = self._max_busy - sum(bool(worker.jobs) for worker in self._workers)
        for worker in [w for w in self._workers if w.idle][:num_free]:
            if self._waiting:
                self._send(worker)

    def _send(self, worker: WorkerProcess) -> None:
        # The last jobs are spread over all workers rather than queued behind one.
        most = min(JOBS_PER_MESSAGE, -(-len(self._waiting) // self._max_busy))
        num_chars = 0
        while self._waiting and len(worker.jobs) < most and num_chars < CHARS_PER_MESSAGE:
            worker.jobs.append(self._waiting.popleft())
            num_chars += len(worker.jobs[-1].text)
        first = worker.num_jobs
        worker.num_jobs += len(worker.jobs)
        worker.waited_since = time.monotonic()
        lines = [f"[{first + i}, {job.text}]" for i, job in enumerate(worker.jobs)]
        worker.write(f'{{"jobs": [{", ".join(lines)}]}}')

    def _receive(self, worker: WorkerProcess) -> bool:
        """Read a worker's messages, or notice its end; True where there was either."""
        replies = worker.read()
        if replies is None:
            self._on_worker_exit(worker)
            return True
        for reply in replies:
            if "failed" in reply:
                raise RewardError(reply["failed"])
            if "id" in reply:
                self._settle(worker, reply)
            else:
                worker.ready, self._failed_starts = True, 0
                self._per_group = reply["per_group"]
                worker.start_bytes = reply["resident_bytes"]
                self.rubrics = {name: RubricText(*r) for name, r in reply["rubrics"].items()}
        return bool(replies)

    def _settle(self, worker: WorkerProcess, reply: Mapping[str, Any]) -> None:
        assert reply["id"] == worker.num_jobs - len(worker.jobs)
        job = worker.jobs.popleft()
        worker.waited_since = time.monotonic()
        worker.resident_bytes = reply["resident_bytes"]
        milliseconds = round(reply["ms"] / len(job.samples), 3)
        scored = [self._combine(results, milliseconds) for results in reply["results"]]
        job.future.set_result(job, scored)

    def _combine(self, results: Sequence[Sequence[Any]], milliseconds: float) -> Verdict:
        """The weighted sum over the functions; None does not count.

        The reason is that of the first fault, else of the first function that is not ok. Correct is
        what earns the best of every function: at least 1 where its weight is positive, at most 0
        where it is negative. A sum would let one function outbid another, and .7 + .2 + .1 is not 1.
        """
        total, best, reasons, checks = 0.0, [], [], []
        for name, weight, result in zip(self.functions, self._weights, results, strict=True):
            reward, reason, detail, found = result
            checks += [(rubric, met) for rubric, met in found]
            if detail:
                self._log_once(name, reason, detail)
            if reward is not None:
                total += weight * reward
                reasons.append(reason)
                if weight != 0.0:
                    best.append(reward >= 1.0 - TIE if weight > 0 else reward <= TIE)
        if not reasons:
            return Verdict(0.0, "unscored", milliseconds, False, tuple(checks))
        not_ok = [reason for reason in reasons if reason != "ok"]
        faults = [reason for reason in not_ok if reason.startswith(FAULTS)]
        reason = [*faults, *not_ok, "ok"][0]
        correct = bool(best) and all(best)
        return Verdict(total, reason, milliseconds, checks=tuple(checks), correct=correct)

    def _log_once(self, name: str, reason: str, detail: str) -> None:
        name = Path(name).name
        self.fault = f"reward {name}: {detail}"
        if not self._is_trying and (name, reason) not in self._logged:
            self._logged.add((name, reason))
            logger.warning(
                "reward %s: %s; counted as %s, and further ones only counted", name, detail, reason
            )

    # --- start and end of workers -----------------------------------------------------------------

    def _start_missing(self) -> bool:
        """One worker a turn; the spare comes last, so that it delays nobody's first job."""
        all_ready = all(worker.ready for worker in self._workers)
        if len(self._workers) < self._max_busy + all_ready:
            self._start_worker()
            return True
        return False

    def _start_worker(self) -> None:
        setup = {
            "functions": self.functions,
            "memory_bytes": self._memory,
            "soft_seconds": self._soft_seconds,
        }
        self._workers.append(WorkerProcess(setup, self._selector))

    def _replace_worn(self) -> None:
        """One at a time, and only while the spare can take over at once."""
        if len(self._workers) > self._max_busy and all(worker.ready for worker in self._workers):
            for worker in self._workers:
                grown = worker.resident_bytes - worker.start_bytes
                is_worn = worker.num_jobs >= WORN_JOBS or grown >= self._worn_bytes
                if worker.idle and is_worn:
                    self._remove(worker)
                    break

    def _kill_late(self) -> bool:
        now, killed = time.monotonic(), False
        for worker in [w for w in self._workers if w.jobs or not w.ready]:
            if self._deadline(worker) > now or self._receive(worker):
                continue  # in time, or it had answered while we were away
            killed = True
            self._remove(worker)
            if worker.jobs:
                job = worker.jobs.popleft()
                self._log_once(self._names, "timeout", "killed at the time limit")
                milliseconds = 1000 * (now - worker.waited_since)
                scored = Verdict(0.0, "timeout", round(milliseconds / len(job.samples), 3))
                job.future.set_result(job, [scored] * len(job.samples))
                self._requeue(worker)
            else:
                self._count_failed_start(f"not ready after {START_SECONDS:g} s")
        return killed

    def _on_worker_exit(self, worker: WorkerProcess) -> None:
        """A worker is gone without our doing. Its job need not be the cause, and is tried again."""
        self._remove(worker)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(0.01)  # its pipes are closed: it has ended, or is about to
        how = f"exit code {worker.process.returncode}"
        if not worker.ready:
            self._count_failed_start(f"ended with {how}")
        elif worker.jobs:
            job = worker.jobs[0]
            job.crashes += 1
            if job.crashes >= CRASHES_PER_JOB:
                worker.jobs.popleft()
                self._log_once(self._names, "worker_died", f"ended the worker ({how})")
                job.future.set_result(job, [Verdict(0.0, "worker_died")] * len(job.samples))
        self._requeue(worker)

    @property
    def _names(self) -> str:
        return ", ".join(Path(reference).name for reference in self.functions)

    def _requeue(self, worker: WorkerProcess) -> None:
        self._waiting.extendleft(reversed(worker.jobs))
        worker.jobs.clear()

    def _count_failed_start(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= CRASHES_PER_JOB:
            self._failed_starts = 0
            raise RewardError(f"the reward worker does not start ({self._names}): it {how}")

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        self._killed.append(worker)
        worker.kill()


def _hard_seconds(reference: str, timeout_seconds: float) -> float:
    soft_seconds = getattr(REWARDS.get(reference), "max_seconds", timeout_seconds)
    return min(timeout_seconds, HARD_PER_SOFT * soft_seconds)


def _shut_down(
    workers: list[WorkerProcess],
    killed: list[WorkerProcess],
    selector: selectors.BaseSelector,
    owner: int,
) -> None:
    if os.getpid() != owner:  # a forked child ends; the workers are its parent's
        return
    for worker in workers:
        worker.kill()
    for worker in [*workers, *killed]:
        worker.process.wait()
    workers.clear()
    killed.clear()
    selector.close()
