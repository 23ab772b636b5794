r"""Intervals, unions and inequalities in one form. Pure standard library."""

from __future__ import annotations

import re

_LESS, _MORE = r"<|\\leq?(?![a-zA-Z])|\\lt(?![a-zA-Z])", r">|\\geq?(?![a-zA-Z])|\\gt(?![a-zA-Z])"
_HALF_LINE = re.compile(rf"([a-z])\s*(?:({_LESS})|({_MORE}))\s*([^<>=,;]+)")
_CHAIN = re.compile(rf"([^<>=,;]+?)({_LESS}|{_MORE})\s*([a-z])\s*({_LESS}|{_MORE})([^<>=,;]+)")
_OR = re.compile(r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\bor\b|\\lor|\\vee)\s*")
_AND = re.compile(r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*and\s*\}|\band\b|\\land|\\wedge|,)\s*")


def as_intervals(text: str) -> str:
    r"""`x < 2 or x \geq 3` as `(-\infty, 2) \cup [3, \infty)`, `x > 2 and x < 3` as `(2, 3)`.

    Any other text as it is.
    """
    if chain := _CHAIN.fullmatch(text):
        left, one, _, other, right = (group.strip() for group in chain.groups())
        if re.fullmatch(_MORE, one) and re.fullmatch(_MORE, other):
            left, one, other, right = right, other, one, left
        elif not (re.fullmatch(_LESS, one) and re.fullmatch(_LESS, other)):
            return text
        opening = "[" if "e" in one else "("
        return f"{opening}{left}, {right}{']' if 'e' in other else ')'}"
    if len(parts := _half_lines(_OR.split(text))) > 1:
        return r" \cup ".join(f"{_start(part)}, {_end(part)}" for part in parts)
    if len(parts := _half_lines(_AND.split(text))) == 2:
        starts = [_start(part) for part in parts if part[3]]
        ends = [_end(part) for part in parts if part[2]]
        if len(starts) == len(ends) == 1 and parts[0][1] == parts[1][1]:
            return f"{starts[0]}, {ends[0]}"
    return text


def _half_lines(parts: list[str]) -> list[re.Match[str]]:
    found = [match for part in parts if (match := _HALF_LINE.fullmatch(part.strip()))]
    return found if len(found) == len(parts) else []


def _start(line: re.Match[str]) -> str:
    if not line[3]:
        return r"(-\infty"
    return f"{'[' if line[3].startswith(chr(92) + 'ge') else '('}{line[4].strip()}"


def _end(line: re.Match[str]) -> str:
    if not line[2]:
        return r"\infty)"
    return f"{line[4].strip()}{']' if line[2].startswith(chr(92) + 'le') else ')'}"


_HALF_OPEN = re.compile(r"([][])([^][();,]+)[,;]([^][();,]+)([][])")


def half_open_as_in_english(text: str) -> str:
    r"""`[1, 4[ \cup ]5, \infty[`, as is written in France, as `[1, 4) \cup (5, \infty)`."""
    pieces = [_HALF_OPEN.fullmatch(piece.strip()) for piece in text.split(r"\cup")]
    if not all(pieces):
        return text
    return r" \cup ".join(
        f"{'(' if p[1] == ']' else '['}{p[2]}, {p[3]}{')' if p[4] == '[' else ']'}"
        for p in pieces
        if p
    )
