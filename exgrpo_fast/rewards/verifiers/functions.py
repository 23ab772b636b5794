"""The built-in rewards. `math_verify` and `multiple_choice` are in separate files.

Imported by the reward workers: it loads no torch, and reasoning-gym only when it is asked for.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from exgrpo_fast.rewards.judgement import (
    CORRECT,
    NO_ANSWER,
    WRONG,
    Judgement,
    RewardError,
    RewardFunction,
)
from exgrpo_fast.rewards.verifiers import extraction
from exgrpo_fast.rewards.verifiers.choices import multiple_choice
from exgrpo_fast.rewards.verifiers.mathematics import math_verify
from exgrpo_fast.rewards.verifiers.numerals import number, plain_form

# --- exact ----------------------------------------------------------------------------------------


def exact(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[Judgement]:
    """1.0 where the final answer is the gold answer, character by character after cleaning.

    A gold answer that is a number rather than a text is compared as a number. A completion without a
    box, `####` or `<answer>` is taken as a whole.
    """
    return [_exact(text, gold) for text, gold in zip(completions, answer, strict=True)]


def _exact(completion: str, gold: Any) -> Judgement:
    found = extraction.final_answer(completion)
    if found is None:
        found = extraction.clean(extraction.visible_part(completion))
    text = extraction.gold_text(gold)
    if plain_form(found) == plain_form(text):
        return CORRECT
    value = number(found) if isinstance(gold, int | float) else None
    return CORRECT if value is not None and value == number(text) else WRONG


def _exact_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return CORRECT if plain_form(extraction.gold_text(gold)) else (0.0, "empty")


# --- gsm8k ----------------------------------------------------------------------------------------


def gsm8k(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[Judgement]:
    """1.0 where the number after the last `####` (else in the last box or tag) is the gold number.

    Commas, a dollar sign, a percent sign and a unit behind the number are ignored.
    """
    return [
        _gsm8k(text, extraction.gold_text(gold))
        for text, gold in zip(completions, answer, strict=True)
    ]


def _gsm8k(completion: str, gold: str) -> Judgement:
    after_hashes = extraction.last_hashes(extraction.visible_part(completion))
    found = after_hashes if after_hashes else extraction.final_answer(completion)
    value = None if found is None else _leading_number(found)
    if value is None:
        return NO_ANSWER
    return CORRECT if value == _leading_number(gold) else WRONG


def _gsm8k_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return (0.0, "not_a_number") if _leading_number(extraction.gold_text(gold)) is None else CORRECT


_LEADING_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?![\d,])")


def _leading_number(text: str) -> Fraction | None:
    text = re.sub(r"\\?\$|\\!|\s", "", extraction.clean(text))
    match = _LEADING_NUMBER.match(text)
    return None if match is None else number(match.group())


# --- last number ----------------------------------------------------------------------------------


def last_number(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[Judgement]:
    """1.0 where the last number of the completion is the gold number, in a sentence or alone.

    For models too small to keep to a format, and only for them: whatever stands before the number,
    it counts.
    """
    return [
        _last_number(text, extraction.gold_text(gold))
        for text, gold in zip(completions, answer, strict=True)
    ]


# A minus sign belongs to the number unless it stands behind one: `3-4` ends in 4, `= -1` in -1.
_ANY_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4})?"
)


def _last_number(completion: str, gold: str) -> Judgement:
    text = extraction.clean(extraction.visible_part(completion)[-extraction.WINDOW_CHARS :])
    found = _ANY_NUMBER.findall(text)
    value = number(found[-1]) if found else None
    if value is None:
        return NO_ANSWER
    return CORRECT if value == number(gold) else WRONG


def _last_number_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return (0.0, "not_a_number") if number(gold) is None else CORRECT


# --- reasoning-gym --------------------------------------------------------------------------------


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[str],
    reasoning_gym: Sequence[str] | None = None,
    metadata: Sequence[Any] | None = None,
    gym_options: Sequence[str] | None = None,
    **columns: Any,
) -> list[Judgement]:
    """The task's own score in [0, 1] of the final answer; columns as `data/sources.py` makes them.

    The reason is `partial` between 0 and 1, and `no_task` for a row of another source.
    """
    absent = [None] * len(completions)
    names, facts, options = reasoning_gym or absent, metadata or absent, gym_options or absent
    return [_gym(*row) for row in zip(completions, answer, names, facts, options, strict=True)]


def _gym(completion: str, gold: str, name: str | None, metadata: Any, options: Any) -> Judgement:
    if not name:
        return 0.0, "no_task"
    found = extraction.final_answer(completion)
    return NO_ANSWER if found is None else _gym_score(found, gold, name, metadata, options)


def _gym_score(text: str, gold: str, name: str, metadata: Any, options: Any) -> Judgement:
    # `metadata` is a Python literal, because JSON would turn the tuples some scorers compare to
    # into lists. A task without a unique answer has the gold answer None, which is "" in a row.
    entry = {
        "answer": gold or None,
        "metadata": ast.literal_eval(metadata) if isinstance(metadata, str) else metadata,
    }
    score = float(_gym_task(name, options or "{}").score_answer(text, entry))
    return score, "ok" if score == 1.0 else "wrong" if score == 0.0 else "partial"


@lru_cache(maxsize=128)
def _gym_task(name: str, options: str) -> Any:
    return importlib.import_module("reasoning_gym").create_dataset(name, **json.loads(options))


def _gym_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    name = columns.get("reasoning_gym")
    if not name:
        return 0.0, "no_task"
    if not gold:
        return 1.0, "any_answer"  # the task accepts every valid answer and names none
    return _gym_score(gold, gold, name, columns.get("metadata"), columns.get("gym_options"))


def _load_gym() -> None:
    try:
        importlib.import_module("reasoning_gym")
    except ImportError:
        raise RewardError(
            "the reward 'reasoning_gym' needs the package reasoning-gym: "
            "pip install 'exgrpo-fast[gym]'"
        ) from None


# --- the form of a completion, whatever it says -----------------------------------------------------
# They know no gold answer: for adding to a reward that does, with a small weight.


def boxed_once(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[Judgement]:
    r"""1.0 for exactly one `\boxed{...}` after the thinking, closed and with something in it.

    Other reasons: `no_answer`, and `several_boxes`.
    """
    return [_boxed_once(completion) for completion in completions]


def _boxed_once(completion: str) -> Judgement:
    text = extraction.visible_part(completion)
    if text.count("\\boxed") > 1:
        return 0.0, "several_boxes"
    return CORRECT if extraction.clean(extraction.last_box(text) or "") else NO_ANSWER


def think_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[Judgement]:
    """1.0 for thoughts in one `<think>...</think>`, then an answer.

    A prompt that ends in `<think>`, as some chat templates make them, has opened it already. Other
    reasons: `no_think` (not opened first thing, not closed, or empty), `think_twice`, `no_answer`.
    """
    return [_think_format(*row) for row in zip(prompts, completions, strict=True)]


def _think_format(prompt: str, completion: str) -> Judgement:
    opened_by_prompt = prompt.rstrip().endswith("<think>")
    before, opened, rest = ("", "<think>", completion)
    if not opened_by_prompt:
        before, opened, rest = completion.partition("<think>")
    thoughts, closed, answer = rest.partition("</think>")
    if before.strip() or not opened or not closed or not thoughts.strip():
        return 0.0, "no_think"
    if any(tag in text for tag in ("<think>", "</think>") for text in (thoughts, answer)):
        return 0.0, "think_twice"
    return CORRECT if answer.strip() else NO_ANSWER


# --- all of them ----------------------------------------------------------------------------------

BUILT_IN: dict[str, RewardFunction] = {
    "math_verify": math_verify,
    "exact": exact,
    "gsm8k": gsm8k,
    "last_number": last_number,
    "multiple_choice": multiple_choice,
    "reasoning_gym": reasoning_gym,
    "boxed_once": boxed_once,
    "think_format": think_format,
}

exact.check_gold = _exact_gold  # pyright: ignore[reportFunctionMemberAccess]
gsm8k.check_gold = _gsm8k_gold  # pyright: ignore[reportFunctionMemberAccess]
last_number.check_gold = _last_number_gold  # pyright: ignore[reportFunctionMemberAccess]
reasoning_gym.check_gold = _gym_gold  # pyright: ignore[reportFunctionMemberAccess]
reasoning_gym.warm_up = _load_gym  # pyright: ignore[reportFunctionMemberAccess]
