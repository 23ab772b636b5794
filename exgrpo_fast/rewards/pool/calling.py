"""How a reward function is called: which arguments it gets, and what its return value means."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from exgrpo_fast.core.types import RewardSample
from exgrpo_fast.rewards.judgement import Result, RewardError, RewardFunction, describe

# An awaited reward is cancelled a little before the alarm: a cancelled coroutine can tidy up.
AWAITED_SHARE = 0.95


class SoftTimeout(BaseException):
    """Raised by the timer inside a reward; no Exception, so that `except Exception` lets it by."""


def of_row(sample: RewardSample) -> dict[str, Any]:
    """The columns; the answer among them as the row has it, where it is no text."""
    return {"answer": sample.answer, **sample.columns}


class EventLoop:
    """Awaits what async rewards return, in one loop for the life of the process.

    A client that a reward keeps between calls belongs to the loop it was made in.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Awaitable[Any], seconds: float) -> Any:
        """Its result; SoftTimeout, the awaitable being cancelled, after so many seconds."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(_bounded(awaitable, seconds))
        try:
            return self._loop.run_until_complete(task)
        finally:
            if not task.done():  # the alarm hit the loop's own code
                self._loop = None


async def _bounded(awaitable: Awaitable[Any], seconds: float) -> Any:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise SoftTimeout from None
        raise  # the reward's own


class LoadedReward:
    """A reward function whose signature has been read, once.

    per_group: whether it gets all completions of a question in one call.
    RewardError where the signature cannot be read.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self._parameters = _parameters(function, name)
        self._takes_one = "completion" in self._parameters and "completions" not in self._parameters
        self.per_group = bool(getattr(function, "per_group", False))
        if self.per_group and self._takes_one:
            raise RewardError(
                f"reward '{name}': per_group needs a parameter 'completions', a list, and it has "
                "'completion'"
            )

    def seconds(self, limit: float) -> float:
        return min(limit, getattr(self.function, "max_seconds", limit))

    @property
    def cpu_seconds(self) -> float:
        """0: no limit."""
        return getattr(self.function, "max_cpu_seconds", 0.0)

    def __call__(
        self, samples: Sequence[RewardSample], run: Callable[[Awaitable[Any]], Any]
    ) -> list[Result]:
        """One result each; `run` awaits what an async function returns."""
        given = self._arguments(samples)
        missing = self._missing(given)
        if missing:
            there = ", ".join(of_row(samples[0]))
            detail = f"asks for the column '{missing}'; columns there: {there}"
            return [Result(0.0, "missing_column", detail)] * len(samples)
        returned = self.function(**{name: given[name] for name in self._accepted(given)})
        if inspect.isawaitable(returned):
            returned = run(returned)
        if self._takes_one and returned is None:
            return [Result(None, "ok")]
        return as_results(returned, len(samples))

    def check_gold(self, sample: RewardSample) -> Result:
        check = getattr(self.function, "check_gold", None)
        if check is None:
            return Result(None, "")
        return as_results(check(sample.answer, sample.columns), 1)[0]

    def _arguments(self, samples: Sequence[RewardSample]) -> dict[str, Any]:
        if self._takes_one:
            [one] = samples
            return {**of_row(one), "prompt": one.prompt, "completion": one.completion}
        rows = [of_row(sample) for sample in samples]
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            **{name: [row.get(name) for row in rows] for name in names},
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.completion for sample in samples],
        }

    def _accepted(self, given: Mapping[str, Any]) -> list[str]:
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters.values()):
            return list(given)
        return [name for name in given if name in self._parameters]

    def _missing(self, given: Mapping[str, Any]) -> str | None:
        for name, parameter in self._parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and parameter.default is parameter.empty and name not in given:
                return name
        return None


def _parameters(function: RewardFunction, name: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward '{name}': no signature: {describe(error)}") from None


# --- what it returns ------------------------------------------------------------------------------


def as_results(value: Any, count: int) -> list[Result]:
    """`[x, ...]` with one entry for each sample -> results.

    An entry is a number, None or `(number, reason)`; for one sample it may come without the list.
    """
    if value is None:
        return [_no_number("None instead of a list; is a `return` missing?")] * count
    if count == 1 and (_is_judgement(value) or _is_number(value)):
        return [_as_result(value)]
    if not hasattr(value, "__len__") or isinstance(value, str | bytes | dict):
        return [_no_number(f"{_short(value)} instead of a list")] * count
    if len(value) != count:
        return [_no_number(f"{len(value)} rewards for {count} completions")] * count
    return [_as_result(entry) for entry in value]


def _as_result(value: Any) -> Result:
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
