"""What math-verify must not be asked.

Two kinds: answers that are provably too large, and answers that say several things at once and that
math-verify 0.9.0 accepts all the same. A cleverer net for large ones refuses honest answers; what
slips through is stopped by the worker's timer.
"""

from __future__ import annotations

import math
import re

from exgrpo_fast.rewards.verifiers.quantities import quantity

# --- too large ------------------------------------------------------------------------------------

_LARGE = {
    "digits": re.compile(r"\d{60}"),
    "factorial": re.compile(r"\d{4,}[\s})]*!|!\s*[})]?\s*!"),
    "binomial": re.compile(
        r"\\[dt]?binom\s*\{?[^{}]*\d{5}|\\[dt]?binom\s*\{[^{}]*\}\s*\{[^{}]*\d{5}"
    ),
    "exponent": re.compile(r"(?:\^|\*\*)\s*[{(]?\s*[-+]?\s*\d{5}"),
}
_TOWER = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*(\d{1,4})\s*(?:\^|\*\*)\s*[{(]?\s*(\d{1,4})")


def too_large(text: str) -> str | None:
    """Why this answer is not evaluated, as a word; None when it may be."""
    if len(text) > 512:
        return "length"
    if text.count("|") > 6:
        return "bars"
    if _depth(text) > 8:
        return "depth"
    for reason, pattern in _LARGE.items():
        if pattern.search(text):
            return reason
    return "exponent" if any(_huge(*t.groups()) for t in _TOWER.finditer(text)) else None


def _huge(base: str, exponent: str) -> bool:
    """Whether base^exponent, itself an exponent, has five digits or more."""
    return int(base) > 1 and int(exponent) * math.log10(int(base)) >= 4.0


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


# --- several things at once -----------------------------------------------------------------------

_RELATION = re.compile(r"(?<![<>!:\\])={1,2}|\\equiv(?![a-zA-Z])")
_SEPARATOR = re.compile(r"[,;]|\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|\s(?:and|or)\s|\\\\")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_VARIABLE = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu"
    r"|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega"
    r"|angle|ell)(?![a-zA-Z])"
)
_HEDGE = re.compile(
    r"(?<!\\)\b(or|and|maybe|perhaps|possibly|probably|either|not|never|but|wrong|incorrect|false"
    r"|if|otherwise|unless|else|is|are|too|plus|minus|times|than|squared|cubed|factorial)\b",
    re.IGNORECASE,
)
_TEXT_WITH_DIGIT = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\d[^{}]*\}")
_SEVERAL = re.compile(r"[,;]|\\\{|\\pm|\\cup|\b(?:and|or)\b")


def says_several_things(found: str, gold: str) -> str | None:
    if _chained(found) and not _chained(gold):
        return "equals"
    hedges = {word.lower() for word in _HEDGE.findall(found)}
    hedges -= {word.lower() for word in _HEDGE.findall(gold)}
    if hedges - {"and", "or"} or hedges and not _SEVERAL.search(gold):
        return "words"
    with_digit = _TEXT_WITH_DIGIT.search(found)
    if with_digit and not _TEXT_WITH_DIGIT.search(gold):
        outside = found[: with_digit.start()] + found[with_digit.end() :]
        if any(c.isdigit() for c in outside):
            return "second_number"
    return None


def numeric_sides(text: str) -> list[str]:
    r"""`n = 3 \cdot 4 = 12`, `\frac{1}{4} or 0.25` -> sides that are all numbers, two or three; else none."""
    text = _ALTERNATIVE.sub("=", text)
    sides = [] if _SEPARATOR.search(text) else _RELATION.split(text)
    if len(sides) > 2 and not _is_numeric(sides[0]):
        sides = sides[1:]
    return sides if len(sides) in (2, 3) and all(map(_is_numeric, sides)) else []


_ALTERNATIVE = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b")


def _chained(text: str) -> bool:
    """Whether a part is `a = b = c`, or `41 = 42` with numbers on its left."""
    for part in _SEPARATOR.split(text):
        sides = _RELATION.split(part)
        if len(sides) > 2 or len(sides) == 2 and _is_numeric(sides[0]):
            return True
    return False


def _is_numeric(text: str) -> bool:
    if not any(c.isdigit() for c in text) or _VARIABLE.search(text):
        return False
    if quantity(text.strip()) is not None:
        return True
    return not any(c.isalpha() for c in _COMMAND.sub("", text))
