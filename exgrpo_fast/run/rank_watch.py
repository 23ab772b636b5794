"""Detects ranks that hang under torchrun, which restarts all ranks when one ends.

Each rank has a thread that counts upwards in the store that the ranks have met in, and follows the
count of the next rank, the last one that of the first.

    frozen   no thread of a rank runs (a stopped process, C code that keeps the interpreter's lock):
             its count stands still, and the rank before it ends both
    hung     the main thread neither beats (core/heartbeat.py) nor waits for another rank: its own
             thread prints all stacks and ends the process

Silence is counted in intervals in which the observer itself has run: where all pause (a suspended
machine, a stopped process group), none is found.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from exgrpo_fast.core.heartbeat import HEARTBEAT, Heartbeat
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.run.supervisor import Deadlines

LOOKS = 60  # in the time of one deadline: one each 5 s
LOOKS_TO_FREEZE = 24  # without a new count: 2 of the 5 minutes
ENDED = "ended"


class RankWatch:
    """What one rank looks at; `look` is called once an interval."""

    def __init__(
        self,
        place: RankInfo,
        store: dist.Store,
        *,
        deadline: float,
        heartbeat: Heartbeat = HEARTBEAT,
        agent: str | None = None,
    ) -> None:
        """`deadline`: seconds that the main thread may be without progress, but in phases with a limit
        of their own.
        `agent`: names the torchrun that has started this process; None: nothing has."""
        self.place = place
        self.store = store
        self.interval = deadline / LOOKS
        self.heartbeat = heartbeat
        self.agent = agent
        self._num_looks = 0
        self._next_rank = (place.rank + 1) % place.count
        self._last_seen, self._looks_without_news = "", 0
        self._deadlines = Deadlines(deadline)
        self._num_beats, self._silence = heartbeat.num_beats, 0.0  # seconds
        self._publish()

    def look(self) -> str | None:
        """A line about what hangs. RuntimeError where the store does not answer."""
        self._num_looks += 1
        self._publish()
        return self._next_is_frozen() or self._main_thread_hangs()

    def end(self) -> None:
        """Publish that this rank leaves, so that it is not taken for a frozen one."""
        self.store.set(str(self.place.rank), ENDED)

    def kill_frozen(self) -> None:
        """Where it is a child of the same torchrun; a process number says nothing elsewhere."""
        if self._looks_without_news < LOOKS_TO_FREEZE or self.agent is None:
            return
        _, agent, process = self._last_seen.split()
        if agent == self.agent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def _publish(self) -> None:
        state = f"{self._num_looks} {self.agent} {os.getpid()}"
        self.store.set(str(self.place.rank), state)

    def _next_is_frozen(self) -> str | None:
        seen = self.store.get(str(self._next_rank)).decode()
        is_news = seen != self._last_seen or seen == ENDED
        self._last_seen = seen
        self._looks_without_news = 0 if is_news else self._looks_without_news + 1
        if self._looks_without_news < LOOKS_TO_FREEZE:
            return None
        seconds = LOOKS_TO_FREEZE * self.interval
        return f"rank {self._next_rank} is frozen: no sign of life for {seconds:.0f} s"

    def _main_thread_hangs(self) -> str | None:
        heartbeat, phase = self.heartbeat, self.heartbeat.innermost_phase
        if heartbeat.num_beats != self._num_beats:
            self._deadlines.seen(phase, self._silence)
            self._num_beats, self._silence = heartbeat.num_beats, 0.0
        elif not heartbeat.is_waiting:
            self._silence += self.interval
        if self._silence < self._deadlines.of(phase):
            return None
        return (
            f"rank {self.place.rank} hangs: no progress for {self._silence:.0f} s in phase {phase}"
        )


@contextlib.contextmanager
def watched_ranks(
    processes: Processes, *, deadline: float, log: Callable[[str], None]
) -> Iterator[None]:
    """Watch inside the block. A collective: all ranks enter it. `log` gets the line of what hangs."""
    if processes.count == 1:
        yield
        return
    assert processes.store is not None
    shared: Any = processes.store  # torch's stubs lack `clone`
    store = shared.clone()  # for another thread
    store.set_timeout(timedelta(seconds=deadline))
    watch = RankWatch(
        processes.place,
        dist.PrefixStore("rank_watch", store),
        deadline=deadline,
        agent=os.environ.get("GROUP_RANK"),
    )
    processes.all_reduce_max(0)  # all have published
    leaves = threading.Event()
    thread = threading.Thread(target=_watch, args=(watch, leaves, log), daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaves.set()
        thread.join()


def _watch(watch: RankWatch, leaves: threading.Event, log: Callable[[str], None]) -> None:
    try:
        while not leaves.wait(watch.interval):
            if line := watch.look():
                _end(watch, line, log)
        watch.end()
    except RuntimeError as error:
        if not leaves.is_set():
            _end(watch, f"the store of the ranks is lost: {first_line(error)}", log)


def _end(watch: RankWatch, line: str, log: Callable[[str], None]) -> NoReturn:
    """End this process with 1, and a frozen one beside it; torchrun ends the others."""
    print(f"exgrpo-fast: {line}; all ranks end", file=sys.stderr, flush=True)
    log(f"SUPERVISOR {line}; all ranks end")
    faulthandler.dump_traceback(sys.stderr)
    watch.kill_frozen()
    time.sleep(1.0)  # torchrun reports the rank that has ended first
    os._exit(1)
