r"""Where the final answer of a completion stands, and how its text is cleaned.

Takes any string, hostile ones included, and returns the text of the answer; what that text means is
left to the rewards. Linear in the length of the window, so that no completion can make the
search itself slow. Pure standard library: the reward workers import it at start.

The answer is looked for after the last `</think>`, within the last 64 KB, in this order:
the last balanced `\boxed{...}` or `\fbox{...}`, the last `#### ...` line, the last
`<answer>...</answer>`, a last line `Answer: ...`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from exgrpo_fast.core.answers import (
    answer_text,
    box_spans,
    gold_answer,
    last_box,
    last_hashes,
    last_tag,
)

__all__ = [
    "box_spans",
    "clean",
    "final_answer",
    "last_box",
    "last_hashes",
    "last_tag",
    "visible_part",
]

MAX_LINE_CHARS = 500
WINDOW_CHARS = 65_536  # an answer stands at the end; scanning more only costs time


def visible_part(completion: str) -> str:
    """The text after the last `</think>`, at most the last 64 KB of it."""
    return completion[-WINDOW_CHARS:].rpartition("</think>")[2]


def final_answer(completion: str) -> str | None:
    """The cleaned text of the final answer; None when there is none or it is empty."""
    text = visible_part(completion)
    for find in (last_box, last_hashes, last_tag, _answer_line):
        found = find(text)
        if found is not None:
            return clean(found) or None
    return None


_ANSWER_LINE = re.compile(r"\W*(?:the\s+)?(?:final\s+)?answer\W*:\W*?(?=[^\s*])(.*)", re.IGNORECASE)


def _answer_line(text: str) -> str | None:
    """What a last line of the form `Answer: 34` gives."""
    last_line = text.rstrip()[-MAX_LINE_CHARS:].rpartition("\n")[2]
    found = _ANSWER_LINE.fullmatch(last_line)
    return found[1].strip().rstrip("*") if found else None


def gold_text(value: Any) -> str:
    r"""A gold answer, of any type, cleaned; of a worked solution what is in its box or behind `####`."""
    return clean(gold_answer(answer_text(value)))


def clean(text: str) -> str:
    """Digits of every script as 0-9, no control or invisible characters, no lone surrogates.

    Line breaks stay, because an answer may be a grid. Only digits are folded: full NFKC would turn
    42\u00b2 into 422.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    return "".join(map(_clean_character, text)).strip()


def _clean_character(character: str) -> str:
    if character in "\n\t" or character.isascii() and character.isprintable():
        return character
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Cs":
        return "\ufffd"
    if category in ("Cc", "Cf"):
        return ""
    if category == "Zs":
        return " "
    return "-" if character == "\u2212" else character
