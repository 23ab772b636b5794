"""The process in which reward functions run: `python -m exgrpo_fast.rewards.pool.worker`.

One JSON object per line, in on standard input and out on standard output:

    in   {"functions": [...], "memory_bytes": n, "soft_seconds": s, "parent": pid}     once
    out  {"ready": true, "resident_bytes": ..., "per_group": ...,
          "rubrics": {name: [public text, weight, applies to, judged]}}
         or {"failed": "one line"}                                                       once
    in   {"jobs": [[id, [[prompt, completion, answer, columns], ...], checking_gold], ...]}
    out  {"id": id, "ms": ..., "resident_bytes": ...,                                    per job
          "results": [[[reward or null, reason, detail, checks] of each function] of each sample]}

It holds no state between jobs and may be killed at any moment. This is a fence around accidents (a
formula that never ends, a reward that allocates without end), not a jail for hostile programs: the
reward functions are the user's own code.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, BinaryIO

from exgrpo_fast.core.heartbeat import die_with
from exgrpo_fast.core.types import RewardSample
from exgrpo_fast.rewards.judgement import Result, RewardError, describe
from exgrpo_fast.rewards.loading import load_function
from exgrpo_fast.rewards.pool.calling import (
    AWAITED_SHARE,
    EventLoop,
    LoadedReward,
    SoftTimeout,
)
from exgrpo_fast.rewards.rubrics.rubrics import RubricReward, RubricText

REARM_SECONDS = 0.25  # the alarm repeats, in case a bare `except:` or a __del__ swallows one


def main() -> None:
    jobs, replies = _take_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    messages = _messages(jobs)
    setup = next(messages, None)
    if setup is None:
        return
    die_with(setup["parent"])
    _limit_memory(setup["memory_bytes"])
    try:
        rewards = [LoadedReward(load_function(name), name) for name in setup["functions"]]
    except RewardError as error:
        _send(replies, {"failed": str(error)})
        return
    resident = _resident_bytes()
    ready = {"ready": True, "resident_bytes": resident(), "rubrics": _rubrics(rewards)}
    _send(replies, {**ready, "per_group": any(reward.per_group for reward in rewards)})
    run = _Runner(rewards, setup["soft_seconds"])
    for message in messages:  # ends when the pool closes the pipe or dies
        for job_id, samples, checking_gold in message["jobs"]:
            started = time.perf_counter()
            results = run([RewardSample(*sample) for sample in samples], checking_gold)
            milliseconds = round((time.perf_counter() - started) * 1000, 3)
            reply = {"id": job_id, "ms": milliseconds, "resident_bytes": resident()}
            _send(replies, {**reply, "results": results})


# --- the fence ------------------------------------------------------------------------------------


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for ourselves: what a reward prints goes to stderr, what it reads is empty."""
    jobs = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return jobs, replies


def _limit_memory(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        num_bytes = min(num_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))
    except (ValueError, OSError):  # macOS has no such limit
        pass


def _resident_bytes() -> Callable[[], int]:
    """A gauge of this process's memory. Where there is no /proc there is no limit to keep either."""
    try:
        pages = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return lambda: 0
    page_bytes = os.sysconf("SC_PAGESIZE")
    return lambda: int(os.pread(pages, 64, 0).split()[1]) * page_bytes


def _rubrics(rewards: Sequence[LoadedReward]) -> dict[str, RubricText]:
    """What the trainer may know of the rubrics; it does not import the user's file itself."""
    sets = [reward.function for reward in rewards if isinstance(reward.function, RubricReward)]
    return {name: text for rubrics in sets for name, text in rubrics.texts.items()}


# --- one job --------------------------------------------------------------------------------------


class _Runner:
    """Calls rewards on samples, within their time; whatever happens becomes a result."""

    def __init__(self, rewards: Sequence[LoadedReward], soft_seconds: float) -> None:
        self._rewards = rewards
        self._soft_seconds = soft_seconds
        self._event_loop = EventLoop()

    def __call__(self, samples: Sequence[RewardSample], checking_gold: bool) -> list[list[Result]]:
        """For each sample one result of each reward."""
        of_rewards = [self._of_one(reward, samples, checking_gold) for reward in self._rewards]
        return [list(results) for results in zip(*of_rewards, strict=True)]

    def _of_one(
        self, reward: LoadedReward, samples: Sequence[RewardSample], checking_gold: bool
    ) -> list[Result]:
        if checking_gold:
            return [self._timed(reward, 1, lambda s=s: [reward.check_gold(s)])[0] for s in samples]
        if reward.per_group:
            return self._timed(reward, len(samples), lambda: self._call(reward, samples))
        return [self._timed(reward, 1, lambda s=s: self._call(reward, [s]))[0] for s in samples]

    def _call(self, reward: LoadedReward, samples: Sequence[RewardSample]) -> list[Result]:
        seconds = AWAITED_SHARE * reward.seconds(self._soft_seconds) * len(samples)
        return reward(samples, lambda awaitable: self._event_loop.run(awaitable, seconds))

    def _timed(
        self, reward: LoadedReward, count: int, call: Callable[[], list[Result]]
    ) -> list[Result]:
        seconds = reward.seconds(self._soft_seconds) * count
        try:
            try:
                _set_timers(seconds, reward.cpu_seconds * count)
                return _interruptible(call)
            finally:
                _stop_timers()
        except SoftTimeout:
            return [Result(0.0, "timeout", "stopped at its time limit")] * count
        except BaseException as error:  # a reward may raise anything, SystemExit included
            return [Result(0.0, f"error:{type(error).__name__}", describe(error))] * count


def _interruptible(call: Callable[[], list[Result]]) -> list[Result]:
    """The only frame in which, and in whose callees, the alarm raises."""
    return call()


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    """Raise SoftTimeout inside a reward, and nowhere else.

    After a long call into C several alarms wait, and Python delivers them one by one: the first
    ends the reward, the next would hit what the worker does then.
    """
    while frame is not None:
        if frame.f_code is _interruptible.__code__:
            raise SoftTimeout
        frame = frame.f_back


def _set_timers(seconds: float, cpu_seconds: float) -> None:
    """Of the clock on the wall, and, unless 0, of the work done, which a busy machine leaves alone.

    Set anew for each job: a reward may have installed timers of its own.
    """
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGPROF, _on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, REARM_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds, REARM_SECONDS if cpu_seconds else 0.0)


def _stop_timers() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    # An alarm of the reward's own may still wait for its handler.
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGPROF, _on_alarm)


def _messages(jobs: BinaryIO) -> Iterator[dict[str, Any]]:
    """One for each line; a torn one is what a trainer that was killed has left behind."""
    for line in jobs:
        if not line.endswith(b"\n"):
            return
        yield json.loads(line)


def _send(replies: BinaryIO, message: Mapping[str, Any]) -> None:
    try:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()
    except BrokenPipeError:  # nobody is there any more
        os._exit(0)


if __name__ == "__main__":
    main()
