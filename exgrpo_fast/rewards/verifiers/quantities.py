r"""The exact value of an answer that is a rational number, with a unit behind it or not.

Exact, because math-verify compares numbers by their first six decimals: to it 2^{-98} is 2^{-99}.
Pure standard library, and bounded: what would be large is None.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from exgrpo_fast.rewards.verifiers.numerals import number

MAX_CHARS, MAX_BITS, MAX_DEPTH = 200, 40_000, 12


class Quantity(NamedTuple):
    value: Fraction
    unit: str = ""  # as it stands there; "%" for a percentage, whose value is not divided


@lru_cache(maxsize=16_384)
def quantity(text: str) -> Quantity | None:
    """Number and unit of an answer that is in `notation.latex`; None for anything else."""
    if len(text) > MAX_CHARS:
        return None
    text = _ASSIGNED.sub("", text)
    value = rational(text)
    if value is not None:
        return Quantity(value)
    if (several := _of_several_units(text)) is not None:
        return several
    percent = _PERCENT.fullmatch(text)
    if percent is not None and (value := rational(percent[1])) is not None:
        return Quantity(value, "%")
    for pattern in (_TYPESET_UNIT, _DEGREES, _BARE_UNIT):
        found = pattern.fullmatch(text)
        if found is None or _NO_UNIT.search(found[2]):
            continue
        value = rational(found[1])
        if value is not None:
            return _scaled(value, _plain_unit(found[2]))
    return None


_ASSIGNED = re.compile(r"^[a-zA-Z]\s*=\s*")
_PERCENT = re.compile(r"(.*\d.*?)\s*(?:\\?%|(?:\\(?:text|mathrm)\s*\{)?\s*(?:per ?cent|pct)\s*\}?)")
_POWER = r"(?:\s*\^\s*\{?\s*-?[1-4]\s*\}?)"
_TYPESET_UNIT = re.compile(
    r"(.*?[\d})!])((?:\s*(?:/|\\cdot|\\times|~|\\,)?\s*"
    r"\\(?:text|mathrm|mbox|textrm|textbf|operatorname)\s*"
    rf"\{{(?:[^{{}}\\0-9^]|\\[ ,;]|{_POWER})*\}}{_POWER}?)+)\s*\.?"
)
_DEGREES = re.compile(
    r"(.*?[\d})])(\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*(?:\\(?:text|mathrm)\s*\{)?\s*[CFK]\s*\}?)?)"
)
_SYMBOLS = (
    "mm|cm|dm|km|m|in|ft|yd|mi|kg|mg|g|lbs?|oz|ml|mL|L|s|sec|min|hrs?|h|Hz|N|J|W|kW|V|A|Pa|mph|kph"
    "|C|K|F|T|mol|eV|kPa|atm|rad|deg|u|sq|cu"
)
_WORD = rf"(?:[A-Za-z]{{3,}}|{_SYMBOLS})\.?{_POWER}?"
_BARE_UNIT = re.compile(
    rf"(.*?[\d}}])((?:\s+{_WORD}|(?<=\d)(?:mm|cm|dm|km|kg|mg|ml|mL|ft|lbs?)(?![a-zA-Z]){_POWER}?)"
    rf"(?:\s*/\s*{_WORD}|\s+{_WORD}){{0,3}})\s*"
)
# Functions, and words that take an answer back.
_NO_UNIT = re.compile(
    r"(?<![a-zA-Z])(?:sin|cos|tan|sec|csc|cot|log|exp|lim|max|min(?=\s*\()|mod|gcd|lcm|sqrt"
    r"|or|and|maybe|perhaps|possibly|probably|either|not|but|wrong|incorrect|false|if|is)(?![a-zA-Z])",
    re.IGNORECASE,
)


_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9} | {
    "trillion": 10**12
}


def _scaled(value: Fraction, unit: str) -> Quantity:
    first, _, rest = unit.partition(" ")
    scale = _SCALES.get(first)
    return Quantity(value, unit) if scale is None else Quantity(value * scale, rest)


def _plain_unit(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox|textrm|textbf|operatorname)\s*", "", text)
    text = re.sub(r"\\circ", "degrees", text)
    return " ".join(re.sub(r"[{}~.^]|\\[ ,;]", " ", text).split()).lower()


# Spellings, and how many of the first of its kind one is.
_KINDS: dict[str, list[tuple[str, int]]] = {
    "length": [
        ("mm|millimet(?:er|re)s?", 1),
        ("cm|centimet(?:er|re)s?", 10),
        ("dm|decimet(?:er|re)s?", 100),
        ("m|met(?:er|re)s?", 1000),
        ("km|kilomet(?:er|re)s?", 1_000_000),
    ],
    "imperial length": [
        ("in|inch|inches", 1),
        ("ft|foot|feet", 12),
        ("yd|yards?", 36),
        ("mi|miles?", 63_360),
    ],
    "mass": [("mg|milligrams?", 1), ("g|grams?", 1000), ("kg|kilograms?", 1_000_000)],
    "weight": [("oz|ounces?", 1), ("lbs?|pounds?", 16)],
    "time": [
        ("s|secs?|seconds?", 1),
        ("min|mins|minutes?", 60),
        ("h|hrs?|hours?", 3600),
        ("days?", 86_400),
        ("weeks?", 604_800),
    ],
    "angle": [("arcseconds", 1), ("arcminutes", 60), ("degrees?", 3600)],
    "radians": [("rad|radians?", 1)],
    "money": [("cents?", 1), ("dollars?|usd", 100)],
}
_VOLUMES = {"ml|millilit(?:er|re)s?": 1000, "l|lit(?:er|re)s?": 1_000_000}  # in mm^3
_KNOWN_UNITS = [
    (re.compile(spellings), kind, 1, size)
    for kind, units in _KINDS.items()
    for spellings, size in units
] + [(re.compile(spellings), "length", 3, size) for spellings, size in _VOLUMES.items()]
_ABBREVIATIONS = {"mph": "mi / h", "kph": "km / h", "kmh": "km / h"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_UNIT_TOKEN = re.compile(r"[a-z]+|-?\d|/")


@lru_cache(maxsize=4096)
def _measure(unit: str) -> tuple[dict[str, int], Fraction] | None:
    """Dimension and size of a unit such as `km per hour`, `sq cm`, `m s -2`; None if a word is unknown."""
    unit = " ".join(_ABBREVIATIONS.get(word, word) for word in unit.lower().split())
    dimension: dict[str, int] = {}
    size = Fraction(1)
    for word, power in _factors(_UNIT_TOKEN.findall(unit)):
        known = next((each for each in _KNOWN_UNITS if each[0].fullmatch(word)), None)
        if known is None:
            return None
        _, kind, of_kind, factor = known
        dimension[kind] = dimension.get(kind, 0) + of_kind * power
        size *= Fraction(factor) ** power
    return (dimension, size) if dimension else None


def _factors(tokens: list[str]) -> list[tuple[str, int]]:
    """`m`, `/`, `s`, `2` -> (m, 1), (s, -2)."""
    factors: list[tuple[str, int]] = []
    sign = ahead = 1
    for token in tokens:
        behind = int(token) if token[-1].isdigit() else _POWERS.get(token)
        if token in ("/", "per"):
            sign = -1
        elif behind is None:
            factors.append((token, sign * ahead))
            ahead = 1
        elif token in ("square", "sq", "cubic", "cu"):
            ahead = behind
        elif factors:
            factors[-1] = (factors[-1][0], factors[-1][1] * behind)
    return factors


def in_unit_of(gold: Quantity, found: Quantity) -> Fraction | None:
    """The value of `found` in the gold answer's unit; None where its unit is of another kind.

    A unit that is missing or not well known is that of the other.
    """
    of_found, of_gold = _measure(found.unit), _measure(gold.unit)
    if of_found is None or of_gold is None:
        return found.value
    return found.value * of_found[1] / of_gold[1] if of_found[0] == of_gold[0] else None


_SEVERAL_UNITS = re.compile(
    r"(?:\d+(?:\.\d+)? ?[A-Za-z]+\.?(?: ?, ?and | ?, ?| and | )?){2,4}", re.ASCII
)
_ONE_OF_THEM = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", re.ASCII)


def _of_several_units(text: str) -> Quantity | None:
    """`5 hours and 30 minutes`, its value in hours; None unless all are of one kind, the largest first."""
    text = re.sub(r"\\(?:text|mathrm|mbox|textrm|textbf)\s*", "", text)
    text = " ".join(re.sub(r"[{}~]|\\[ ,;]", " ", text).split())
    if not _SEVERAL_UNITS.fullmatch(text):
        return None
    numbers, units = zip(*_ONE_OF_THEM.findall(text), strict=True)
    known = [_measure(unit) for unit in units]
    if known[0] is None or any(each is None or each[0] != known[0][0] for each in known):
        return None
    sizes = [each[1] for each in known if each]
    if sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum(Fraction(n) * size for n, size in zip(numbers, sizes, strict=True))
    return Quantity(total / sizes[0], units[0].lower())


# --- rational expressions -------------------------------------------------------------------------

_TOKEN = re.compile(
    r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\\frac|\\cdot|\\times|\\div|[-+*/^(){}!]))", re.ASCII
)


class _NotRational(Exception):
    pass


def rational(text: str) -> Fraction | None:
    r"""The value of `3`, `-1,234.5`, `\frac{1}{2^{98}}`, `1\frac{1}{2}`, `6 \cdot 7`, `5!`; else None."""
    value = number(text)
    if value is not None:
        return value
    if len(text) > MAX_CHARS or not any(c.isdigit() for c in text):
        return None
    tokens: list[str] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        at = match.end()
    try:
        reader = _Reader(tokens)
        value = reader.sum()
        return value if reader.at_end else None
    except (_NotRational, ZeroDivisionError):
        return None


class _Reader:
    """Recursive descent: sum -> product -> signed -> power -> atom."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.depth = 0

    @property
    def at_end(self) -> bool:
        return self.place == len(self.tokens)

    @property
    def next(self) -> str:
        return "" if self.at_end else self.tokens[self.place]

    def take(self, *wanted: str) -> str:
        """The next token where it is one of these, else ""."""
        token = self.next
        if token and token in wanted:
            self.place += 1
            return token
        return ""

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while sign := self.take("*", "/", r"\cdot", r"\times", r"\div"):
            other = self.signed()
            value = _bounded(value / other if sign in ("/", r"\div") else value * other)
        return value

    def signed(self) -> Fraction:
        if sign := self.take("+", "-"):
            return self.signed() if sign == "+" else -self.signed()
        return self.power()

    def power(self) -> Fraction:
        value = self.atom()
        if self.take("!"):
            if value.denominator != 1 or not 0 <= value <= 170:
                raise _NotRational
            value = Fraction(math.factorial(int(value)))
        if self.take("^"):
            value = _raised(value, self.exponent())
        return value

    def exponent(self) -> Fraction:
        if self.next == "{":
            return self.atom()
        token = self.next
        if not token.isdigit():
            raise _NotRational
        # `2^10` without braces is 2^1 times 0 to LaTeX, and 1024 to whoever wrote it.
        self.place += 1
        return Fraction(token)

    def atom(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotRational
        try:
            if self.take("("):
                return self.until(")")
            if self.take("{"):
                return self.until("}")
            if self.take(r"\frac"):
                return self.fraction()
            return self.numeral()
        finally:
            self.depth -= 1

    def until(self, closing: str) -> Fraction:
        value = self.sum()
        if not self.take(closing):
            raise _NotRational
        return value

    def numeral(self) -> Fraction:
        token = self.next
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _NotRational
        self.place += 1
        value = Fraction(token.rstrip("."))
        if token.isdigit() and self.take(r"\frac"):  # a mixed number
            part = self.fraction()
            if not 0 <= part < 1:
                raise _NotRational
            return value + part
        return value

    def fraction(self) -> Fraction:
        r"""What follows `\frac`: two groups, or two digits as in `\frac12`."""
        digits = self.next
        if digits.isdigit() and len(digits) == 2:
            self.place += 1
            return Fraction(int(digits[0]), int(digits[1]))
        above, below = self.part(), self.part()
        return _bounded(above / below)

    def part(self) -> Fraction:
        if self.take("{"):
            return self.until("}")
        digit = self.next
        if not (digit.isdigit() and len(digit) == 1):
            raise _NotRational
        self.place += 1
        return Fraction(digit)


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS:
        raise _NotRational
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotRational
    return value
