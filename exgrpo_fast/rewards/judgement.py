r"""What a reward function is, and what it says about a sample.

Every reward has TRL's signature, so a function written for TRL runs as it is:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

`columns` holds `answer` and every other field of the data row, one entry per completion. Prompts
and completions are plain strings (the rendered chat template and the raw text), never message
lists. The pool calls a function with lists of length 1. None means: this function has no opinion
on this sample.

Conventions that go beyond TRL's, all optional:
  - an entry may be `(reward, reason)`; `reason` is a short word that is counted in the metrics
  - `my_reward.check_gold(answer, columns) -> (reward, reason)` says whether a gold answer is of
    use; it is called for every question before training
  - `my_reward.warm_up()` is called once in each worker, and `my_reward.max_seconds` is a time limit
    below the pool's

They are attributes rather than a class: a reward stays a plain function that anybody may call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exgrpo_fast.errors import UserError

RewardFunction = Callable[..., Any]
Judgement = tuple[float, str]  # reward and reason

RIGHT: Judgement = (1.0, "ok")
WRONG: Judgement = (0.0, "wrong")
NO_ANSWER: Judgement = (0.0, "no_answer")


class RewardError(UserError):
    """A reward that cannot be used, as one line for the user."""
