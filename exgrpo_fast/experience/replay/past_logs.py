"""Completions that another run or another trainer has logged, in one vocabulary.

    ours             completions/step_*.parquet    prompt, completion, reward, truncated, step
    TRL              completions/*.parquet         prompt, completion, advantage, step and a column for
                                                   each reward function; text or chat messages
    verl             rollout_data_dir/*.jsonl      input, output, score, step; special tokens left out
    buffer export    *.parquet                     token ids and log-probs, taken as they are
    anything else    prompt, completion, reward

A row's format is recognised by its fields, so that files of several kinds can be mixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]


class Unusable(ValueError):
    """Why a row is left out, in a few words that are counted."""


@dataclass(frozen=True)
class PastCompletion:
    """One logged completion."""

    prompt_keys: tuple[str, ...]  # any of them names its question
    text: str
    reward: float
    full_marks: float  # the reward of a correct one
    truncated: bool = False
    step: int = 0
    token_ids: tuple[int, ...] = ()  # as generated, where the log has them
    logprobs: tuple[float, ...] = ()  # of these, under the policy that generated them
    entropy: float = math.inf  # mean over its tokens, in nats; infinite: not logged


def past_completion(row: Fields) -> PastCompletion:
    """Unusable where the row is of no known format or lacks what it needs."""
    if "behaviour_logprobs" in row and "token_ids" in row:
        return _exported(row)
    if "input" in row and "output" in row:
        return _read(row, prompt="input", completion="output", rewards=("score",))
    if "prompt" not in row or "completion" not in row:
        raise Unusable("no prompt and completion")
    if "reward" not in row and "advantage" in row:
        return _read(row, prompt="prompt", completion="completion", rewards=_reward_columns(row))
    return _read(row, prompt="prompt", completion="completion", rewards=("reward",))


def _reward_columns(row: Fields) -> tuple[str, ...]:
    """TRL's: one number for each reward function, under the function's name."""
    known = {"step", "prompt", "completion", "advantage"}
    return tuple(name for name, value in row.items() if name not in known and _is_number(value))


def _read(row: Fields, *, prompt: str, completion: str, rewards: Sequence[str]) -> PastCompletion:
    values = [float(row[name]) for name in rewards if _is_number(row.get(name))]
    if not values or len(values) < len(rewards) or not all(map(math.isfinite, values)):
        raise Unusable("no reward")
    text = last_message(row[completion])
    if not text:
        raise Unusable("no text")
    return PastCompletion(
        prompt_keys=prompt_keys(row[prompt]),
        text=text,
        reward=sum(values),
        full_marks=float(len(values)),
        truncated=row.get("truncated") is True,
        step=_step(row.get("step")),
    )


def _exported(row: Fields) -> PastCompletion:
    ids, logprobs = tuple(row["token_ids"] or ()), tuple(row["behaviour_logprobs"] or ())
    if not ids or len(ids) != len(logprobs):
        raise Unusable("no tokens")
    return PastCompletion(
        prompt_keys=(str(row.get("question_id")),),
        text=str(row.get("completion", "")),
        reward=float(row["reward"]),
        full_marks=float(row["reward"]) if row.get("success") else math.inf,
        truncated=row.get("truncated") is True,
        step=_step(row.get("birth_step")),
        token_ids=ids,
        logprobs=logprobs,
        entropy=float(row["entropy"]),
    )


def prompt_keys(prompt: Any) -> tuple[str, ...]:
    """What a question can be found by: its messages, its text, and the text of its last message."""
    if isinstance(prompt, str):
        return (prompt.strip(),)
    messages = _messages(prompt)
    pairs = [[message.get("role"), message.get("content")] for message in messages]
    return json.dumps(pairs, ensure_ascii=False), last_message(prompt).strip()


def last_message(value: Any) -> str:
    """The text, or that of the last of a list of chat messages."""
    if isinstance(value, str):
        return value
    content = _messages(value)[-1].get("content")
    if not isinstance(content, str):
        raise Unusable("messages without text")
    return content


def _messages(value: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or not value or not isinstance(value[-1], Mapping):
        raise Unusable("neither text nor messages")
    return value


def _step(value: Any) -> int:
    return int(value) if _is_number(value) and math.isfinite(value) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
