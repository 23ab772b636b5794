r"""Where the final answer of a completion stands, and how its text is cleaned.

Takes any string, hostile ones included, and returns the text of the answer; what that text means is
left to the rewards. Linear in the length of the window, so that no completion can make the
search itself slow. Pure standard library: the reward workers import it at start.

The answer is looked for after the last `</think>`, within the last 64 KB, in this order:
the last balanced `\boxed{...}`, the last `#### ...` line, the last `<answer>...</answer>`.
"""

from __future__ import annotations

import re
import unicodedata

WINDOW_CHARS = 65_536  # an answer stands at the end; scanning more only costs time

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


def visible_part(completion: str) -> str:
    """The text after the last `</think>`, at most the last 64 KB of it."""
    return completion[-WINDOW_CHARS:].rpartition("</think>")[2]


def final_answer(completion: str) -> str | None:
    """The cleaned text of the final answer; None when there is none or it is empty."""
    text = visible_part(completion)
    for find in (last_box, last_hashes, last_tag):
        found = find(text)
        if found is not None:
            return clean(found) or None
    return None


def last_box(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` that opens last; an unclosed one is none."""
    spans = box_spans(text)
    return text[slice(*spans[-1])] if spans else None


def box_spans(text: str) -> list[tuple[int, int]]:
    r"""Begin and end of what stands in each balanced `\boxed{...}`, by their begin."""
    open_braces: list[int] = []  # where the content of a box begins; -1 for any other brace
    spans: list[tuple[int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                spans.append((start, match.start()))
        elif token[1] == "b":
            open_braces.append(match.end())
    return sorted(spans)


def last_hashes(text: str) -> str | None:
    """What follows the last `####` on its line, GSM8K's way to give an answer."""
    lines = _HASHES.findall(text)
    return lines[-1] if lines else None


def last_tag(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return content if closed and opened else None


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
