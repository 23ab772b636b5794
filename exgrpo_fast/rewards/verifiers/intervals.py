r"""Intervals, unions and inequalities in one form. Pure standard library."""

from __future__ import annotations

import re
from typing import NamedTuple

from exgrpo_fast.rewards.verifiers.quantities import rational

_SIGN = re.compile(r"(<|>|\\(?:[lg]eq?|neq|[lg]t)(?![a-zA-Z]))")
_UNKNOWN = re.compile(r"[a-zA-Z]|\\(?:alpha|beta|theta|lambda|mu)")
_POINT = re.compile(rf"({_UNKNOWN.pattern})\s*=\s*([^=<>]+)")
_TURNED = {"<": ">", ">": "<", r"\neq": r"\neq"} | {
    rf"\{one}{rest}": rf"\{other}{rest}" for one, other in ("gl", "lg") for rest in ("e", "eq", "t")
}
_OR = re.compile(r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\bor\b|\\lor|\\vee)\s*")
_AND = re.compile(r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*and\s*\}|\band\b|\\land|\\wedge|,)\s*")


class _Bounds(NamedTuple):
    unknown: str
    start: str = ""  # with its bracket, as `[2`
    end: str = ""
    hole: str = ""
    point: str = ""


def as_intervals(text: str) -> str:
    r"""`x < 2 or 3 \leq x < 5` as `(-\infty, 2) \cup [3, 5)`, `x \neq 1` without 1.

    Any other text is returned unchanged, and so is a single `x < 2`; `2 > x` is reversed.
    """
    signs = _SIGN.findall(text)
    if not signs:
        return text
    clauses = _OR.split(text)
    conditions = [[_bounds(one) for one in _AND.split(clause)] for clause in clauses]
    unknowns = {bounds and bounds.unknown for clause in conditions for bounds in clause}
    if len(unknowns) != 1 or None in unknowns:
        return text
    if len(signs) == 1 and r"\neq" not in text and len(clauses) == 1:
        value, sign, unknown = _SIGN.split(text)
        turned = _UNKNOWN.fullmatch(unknown.strip())
        return f"{unknown.strip()} {_TURNED[sign]} {value.strip()}" if turned else text
    pieces = [
        _intersection([one for one in bounds if one], is_list="," in clause)
        for bounds, clause in zip(conditions, clauses, strict=True)
    ]
    return r" \cup ".join(pieces) if all(pieces) else text


def _bounds(condition: str) -> _Bounds | None:
    if point := _POINT.fullmatch(condition.strip()):
        return _Bounds(point[1], point=point[2])
    sides = [side.strip() for side in _SIGN.split(condition)]
    values, signs = sides[::2], sides[1::2]
    unknown = [place for place, value in enumerate(values) if _UNKNOWN.fullmatch(value)]
    if len(unknown) != 1 or len(signs) not in (1, 2) or not all(values) or "=" in condition:
        return None
    if signs == [r"\neq"] and unknown == [0]:
        return _Bounds(values[0], hole=values[1])
    more = {sign[0] == ">" or sign.startswith(r"\g") for sign in signs}
    if len(more) != 1 or r"\neq" in signs or len(signs) == 2 and unknown != [1]:
        return None
    at = unknown[0]
    if more == {True}:
        values, signs, at = values[::-1], signs[::-1], len(signs) - at
    start = f"{'[' if 'e' in signs[at - 1] else '('}{values[at - 1]}" if at else ""
    end = f"{values[at + 1]}{']' if 'e' in signs[at] else ')'}" if at < len(signs) else ""
    return _Bounds(values[at], start, end)


def _intersection(bounds: list[_Bounds], *, is_list: bool) -> str:
    """Of at most one start and one end, without the holes; "" for anything else.

    A list of disjoint conditions, `x < 1, x > 2`, means their union.
    """
    if any(one.point for one in bounds):
        return rf"\{{{bounds[0].point}\}}" if len(bounds) == 1 else ""
    starts = [one.start for one in bounds if one.start]
    ends = [one.end for one in bounds if one.end]
    holes = [one.hole for one in bounds if one.hole]
    if len(starts) > 1 or len(ends) > 1:
        return ""
    if is_list and len(bounds) == 2 and starts and ends:
        start, end = rational(starts[0][1:]), rational(ends[0][:-1])
        if start is not None and end is not None and start > end:
            return rf"(-\infty, {ends[0]} \cup {starts[0]}, \infty)"
    whole = ", ".join((*(starts or [r"(-\infty"]), *(ends or [r"\infty)"])))
    if not holes:
        return whole
    whole = whole if starts or ends else r"\mathbb{R}"
    return rf"{whole} \setminus \{{{', '.join(holes)}\}}"


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
