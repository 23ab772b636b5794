r"""Gold answers as data sets write them: a number, a text, or a worked solution that ends in one.

GSM8K's solutions end in `#### 72`, those of MATH have it in `\boxed{72}`. Pure standard library.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_BARE_BOX = re.compile(r"\\boxed[ ~]+((?:[^\s{}$.,]|[.,](?=\d))+)")


def gold_answer(solution: str) -> str:
    r"""What stands behind the last `####`, else in the last `\boxed{}`; the text itself without."""
    hashes = last_hashes(solution)
    if hashes is not None:
        return hashes.strip()
    box = last_box(solution)
    return solution.strip() if box is None else box.strip()


def answer_text(value: Any) -> str:
    """A value of a row as text: 7.0, which is often an integer that a table has widened, as `7`."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, list | dict):
        return json.dumps(value)
    return str(value)


def last_box(text: str) -> str | None:
    r"""The content of the balanced `\boxed{...}` or `\fbox{...}` that opens last, if any."""
    text = _BARE_BOX.sub(r"\\boxed{\1}", text)
    spans = box_spans(text)
    return text[slice(*spans[-1])] if spans else None


def box_spans(text: str) -> list[tuple[int, int]]:
    r"""Begin and end of the content of each balanced `\boxed{...}`, by their begin."""
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
        elif token[1] in "bf":
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
