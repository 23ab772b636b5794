r"""What a reward function is, and what it says about a sample.

Every reward has TRL's signature, so a function written for TRL runs as it is:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

`columns` holds `answer` and every other field of the data row, one entry per completion. Prompts
and completions are plain strings (the rendered chat template and the raw text), never message
lists. The pool calls a function with lists of length 1. None means: this function has no opinion
on this sample. The function may be `async def`: it is awaited in the worker, always in the same
event loop. It may be any object that can be called.

Conventions that go beyond TRL's, all optional:
  - a function with a parameter `completion` instead of `completions` gets one sample, no lists:
    `def my_reward(prompt, completion, answer, **columns) -> float | None`
  - `my_reward.per_group = True`: it is called once with all completions of a question, those that
    replay has brought back among them, rather than with each one
  - an entry may be `(reward, reason)`; `reason` is a short word that is counted in the metrics
  - a list of `Rubric` (rubrics.py) stands for a function that weighs its checks
  - `my_reward.check_gold(answer, columns) -> (reward, reason)` says whether a gold answer is of
    use; it is called for every question before training
  - `my_reward.warm_up()` is called once in each worker, and `my_reward.max_seconds` is a time limit
    below the pool's; `my_reward.max_cpu_seconds` limits the work, however busy the machine is

They are attributes rather than a class: a reward stays a plain function that anybody may call.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from exgrpo_fast.core.errors import UserError

RewardFunction = Callable[..., Any]
Judgement = tuple[float, str]  # reward and reason

CORRECT: Judgement = (1.0, "ok")
WRONG: Judgement = (0.0, "wrong")
NO_ANSWER: Judgement = (0.0, "no_answer")


class Result(NamedTuple):
    """What a worker says of one function and one sample; rubrics return it, with their checks."""

    reward: float | None
    reason: str
    detail: str = ""  # a sentence for the log
    checks: tuple[tuple[str, bool], ...] = ()  # rubrics by name: met or not


class RewardError(UserError):
    """A reward that cannot be used, as one line for the user."""


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and the last line of the user's own code."""
    message = " ".join(str(error).split())[:200]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not Path(f.filename).is_relative_to(sysconfig.get_path("stdlib"))]
    where = "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in (own or frames)[-1:])
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"
