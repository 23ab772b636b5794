"""The process in which reward functions run: `python -m exgrpo_fast.rewards.pool.worker`.

One JSON object per line, in on standard input and out on standard output:

    in   {"functions": [...], "memory_bytes": n, "soft_seconds": s, "parent": pid}     once
    out  {"ready": true, "resident_bytes": ...,
          "rubrics": {name: [public text, weight, applies to, judged]}}
         or {"failed": "one line"}                                                       once
    in   {"jobs": [[id, prompt, completion, answer, columns, checking_gold], ...]}
    out  {"id": id, "ms": ..., "resident_bytes": ...,
          "results": [[reward or null, reason, detail, checks], ...]}                    per job

It holds no state between jobs and may be killed at any moment. This is a fence around accidents (a
formula that never ends, a reward that allocates without end), not a jail for hostile programs: the
reward functions are the user's own code.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from exgrpo_fast.core.heartbeat import die_with
from exgrpo_fast.rewards.judgement import Result, RewardError, RewardFunction, describe
from exgrpo_fast.rewards.loading import load_function
from exgrpo_fast.rewards.rubrics.rubrics import RubricReward, RubricText

REARM_SECONDS = 0.25  # the alarm repeats, in case a bare `except:` or a __del__ swallows one


class SoftTimeout(BaseException):
    """Raised by the timer inside a reward; no Exception, so that `except Exception` lets it by."""


def main() -> None:
    jobs, replies = _take_pipes()
    _ignore_terminal_signals()
    messages = _messages(jobs)
    setup = next(messages, None)
    if setup is None:
        return
    die_with(setup["parent"])
    _limit_memory(setup["memory_bytes"])
    try:
        functions = [load_function(reference) for reference in setup["functions"]]
    except RewardError as error:
        _send(replies, {"failed": str(error)})
        return
    resident = _resident_bytes()
    ready = {"ready": True, "resident_bytes": resident(), "rubrics": _rubrics(functions)}
    _send(replies, ready)
    for message in messages:  # ends when the pool closes the pipe or dies
        for job_id, *job in message["jobs"]:
            started = time.perf_counter()
            results = [_run(function, job, setup["soft_seconds"]) for function in functions]
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


def _ignore_terminal_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business


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


def _rubrics(functions: Sequence[RewardFunction]) -> dict[str, RubricText]:
    """What the trainer may know of the rubrics; it does not import the user's file itself."""
    sets = [function for function in functions if isinstance(function, RubricReward)]
    return {name: text for rubrics in sets for name, text in rubrics.texts.items()}


# --- one job --------------------------------------------------------------------------------------


def _run(function: RewardFunction, job: list[Any], soft_seconds: float) -> Result:
    """Call one function on one sample; whatever happens becomes a result."""
    seconds = min(soft_seconds, getattr(function, "max_seconds", soft_seconds))
    cpu_seconds = getattr(function, "max_cpu_seconds", 0.0)
    try:
        try:
            _set_timers(seconds, cpu_seconds)
            return _call(function, *job)
        finally:
            _stop_timers()
    except SoftTimeout:
        _stop_timers()
        return Result(0.0, "timeout", "stopped at its time limit")
    except BaseException as error:  # a reward may raise anything, SystemExit included
        return Result(0.0, f"error:{type(error).__name__}", describe(error))


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


def _on_alarm(signum: int, frame: FrameType | None) -> NoReturn:
    raise SoftTimeout


def _call(
    function: RewardFunction,
    prompt: str,
    completion: str,
    answer: str,
    columns: dict[str, Any],
    checking_gold: bool,
) -> Result:
    if checking_gold:
        check_gold = getattr(function, "check_gold", None)
        return Result(None, "") if check_gold is None else _as_result(check_gold(answer, columns))
    of_row = {**columns, "answer": answer}
    takes_one = _takes_one(function)
    if takes_one:
        given = {**of_row, "prompt": prompt, "completion": completion}
    else:
        given = {**of_row, "prompts": prompt, "completions": completion}
        given = {name: [value] for name, value in given.items()}
    missing = _missing(function, given)
    if missing:
        detail = f"asks for the column '{missing}'; columns there: {', '.join(of_row)}"
        return Result(0.0, "missing_column", detail)
    returned = function(**{name: given[name] for name in _accepted(function, given)})
    if inspect.iscoroutine(returned):
        returned = asyncio.run(returned)
    return Result(None, "ok") if takes_one and returned is None else _as_result(returned)


def _takes_one(function: RewardFunction) -> bool:
    """Whether it is written for one sample, `f(prompt, completion, ...)`, rather than for lists."""
    parameters = _parameters(function)
    return "completion" in parameters and "completions" not in parameters


def _accepted(function: RewardFunction, given: Mapping[str, Any]) -> list[str]:
    parameters = _parameters(function)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(given)
    return [name for name in given if name in parameters]


def _missing(function: RewardFunction, given: Mapping[str, Any]) -> str | None:
    for name, parameter in _parameters(function).items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.default is parameter.empty and name not in given:
            return name
    return None


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    known = _SIGNATURES.get(function)
    if known is None:
        known = _SIGNATURES[function] = inspect.signature(function).parameters
    return known


_SIGNATURES: dict[RewardFunction, Mapping[str, inspect.Parameter]] = {}


def _as_result(value: Any) -> Result:
    """`[x]`, `[(x, reason)]`, and their bare forms x and (x, reason) -> a result."""
    if value is None:
        return _no_number("None instead of a list; is a `return` missing?")
    if not _is_judgement(value) and not _is_number(value) and hasattr(value, "__len__"):
        if isinstance(value, str | bytes | dict) or len(value) != 1:
            return _no_number(f"{_short(value)} for one sample")
        value = value[0]
    if isinstance(value, Result):
        return value
    reward, reason = value if _is_judgement(value) else (value, "ok")
    if reward is None:
        return Result(None, reason)
    if not _is_number(reward) or not math.isfinite(reward := float(reward)):
        return _no_number(f"{_short(reward)} as a reward")
    return Result(reward, reason)


def _no_number(what: str) -> Result:
    return Result(0.0, "not_a_number", f"returned {what}")


def _is_judgement(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)


def _is_number(value: Any) -> bool:
    """Numbers of Python, numpy and torch; a string that looks like one is a mistake."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return False
    return getattr(value, "shape", ()) == ()


def _short(value: Any) -> str:
    # Not repr() of the value: printing a large number can take longer than computing it.
    return f"{value:g}" if isinstance(value, float) else type(value).__name__


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
