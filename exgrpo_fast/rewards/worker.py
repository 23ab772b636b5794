"""The process in which reward functions run: `python -m exgrpo_fast.rewards.worker`.

One JSON object per line, in on standard input and out on standard output:

    in   {"functions": [...], "memory_bytes": n, "soft_seconds": s, "parent": pid}     once
    out  {"ready": true}   or   {"failed": "one line"}                                   once
    in   {"jobs": [[id, prompt, completion, answer, columns, checking_gold], ...]}
    out  {"id": id, "ms": ..., "results": [[reward or null, reason, detail], ...]}       per job

It holds no state between jobs and may be killed at any moment. This is a fence around accidents (a
formula that never ends, a reward that allocates without end), not a jail for hostile programs: the
reward functions are the user's own code.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from exgrpo_fast.rewards.judgement import RewardError, RewardFunction
from exgrpo_fast.rewards.references import describe, load_function

Result = tuple[float | None, str, str]  # reward, reason, a sentence for the log

REARM_SECONDS = 0.25  # the alarm repeats, in case a bare `except:` or a __del__ swallows one
_PR_SET_PDEATHSIG = 1


class SoftTimeout(BaseException):
    """Raised by the timer inside a reward; no Exception, so that `except Exception` lets it by."""


def main() -> None:
    jobs, replies = _take_pipes()
    _ignore_terminal_signals()
    setup = json.loads(jobs.readline() or b"null")
    if setup is None:
        return
    _die_with(setup["parent"])
    _limit_memory(setup["memory_bytes"])
    try:
        functions = [load_function(reference) for reference in setup["functions"]]
    except RewardError as error:
        _send(replies, {"failed": str(error)})
        return
    _send(replies, {"ready": True})
    for line in jobs:  # ends when the pool closes the pipe or dies
        for job_id, *job in json.loads(line)["jobs"]:
            started = time.perf_counter()
            results = [_run(function, job, setup["soft_seconds"]) for function in functions]
            milliseconds = (time.perf_counter() - started) * 1000
            _send(replies, {"id": job_id, "ms": round(milliseconds, 3), "results": results})


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


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the trainer dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        num_bytes = min(num_bytes, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, hard))
    except (ValueError, OSError):  # macOS has no such limit
        pass


# --- one job --------------------------------------------------------------------------------------


def _run(function: RewardFunction, job: list[Any], soft_seconds: float) -> Result:
    """Call one function on one sample; whatever happens becomes a result."""
    seconds = min(soft_seconds, getattr(function, "max_seconds", soft_seconds))
    try:
        try:
            # Set anew for each job: a reward may have installed a timer of its own.
            signal.signal(signal.SIGALRM, _on_alarm)
            signal.setitimer(signal.ITIMER_REAL, seconds, REARM_SECONDS)
            return _call(function, *job)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except SoftTimeout:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return 0.0, "timeout", f"stopped after {seconds:g} s"
    except BaseException as error:  # a reward may raise anything, SystemExit included
        return 0.0, f"error:{type(error).__name__}", describe(error)


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
        return (None, "", "") if check_gold is None else _as_result(check_gold(answer, columns))
    given = {**columns, "answer": answer, "prompts": prompt, "completions": completion}
    wanted = _accepted(function, given)
    missing = _missing(function, given)
    if missing:
        there = ", ".join(key for key in given if key not in ("prompts", "completions"))
        return 0.0, "missing_column", f"asks for the column '{missing}'; columns there: {there}"
    returned = function(**{name: [given[name]] for name in wanted})
    if inspect.iscoroutine(returned):
        returned = asyncio.run(returned)
    return _as_result(returned)


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
        return 0.0, "not_a_number", "returned None instead of a list; is a `return` missing?"
    if not _is_judgement(value) and not _is_number(value) and hasattr(value, "__len__"):
        if isinstance(value, str | bytes | dict) or len(value) != 1:
            return 0.0, "not_a_number", f"returned {_short(value)} for one sample"
        value = value[0]
    reward, reason = value if _is_judgement(value) else (value, "ok")
    if reward is None:
        return None, reason, ""
    if not _is_number(reward) or not math.isfinite(reward := float(reward)):
        return 0.0, "not_a_number", f"returned {_short(reward)} as a reward"
    return reward, reason, ""


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


def _send(replies: BinaryIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
