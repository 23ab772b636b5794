r"""Rewards for the form of a completion, whatever it says: `boxed_once` and `think_format`.

They know no gold answer, and so they are for adding to a reward that does, with a small weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exgrpo_fast.rewards.judgement import CORRECT, NO_ANSWER, Judgement
from exgrpo_fast.rewards.verifiers import extraction


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
