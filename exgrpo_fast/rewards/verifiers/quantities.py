r"""The exact value of an answer that is a rational number, with a unit behind it or not.

Exact, because math-verify compares numbers by their first six decimals: to it 2^{-98} is 2^{-99}.
Pure standard library, and bounded: what would be large is None.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
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
    for number_part, unit in _splits(text):
        value = rational(number_part)
        if value is not None:
            return _scaled(value, unit)
    return None


def _splits(text: str) -> list[tuple[str, str]]:
    """A text as what may be its number and its unit."""
    matches = (pattern.fullmatch(text) for pattern in (_TYPESET_UNIT, _DEGREES, _BARE_UNIT))
    return [(m[1], _plain_unit(m[2])) for m in matches if m and not _NO_UNIT.search(m[2])]


def converted(found: str, gold: str) -> str | None:
    r"""`50\sqrt{2} \text{ mm}` in the unit of `5\sqrt{2} \text{ cm}`; None for a unit of another kind."""
    of_found, of_gold = _splits(found), _splits(gold)
    if not of_found or not of_gold or max(len(found), len(gold)) > MAX_CHARS:
        return found
    size = in_unit_of(Quantity(Fraction(1), of_gold[0][1]), Quantity(Fraction(1), of_found[0][1]))
    if size is None or size == 1:
        return None if size is None else found
    return rf"\frac{{{size.numerator}}}{{{size.denominator}}} \cdot ({of_found[0][0]})"


_ASSIGNED = re.compile(r"^[a-zA-Z]\s*=\s*")
_PERCENT = re.compile(r"(.*\d.*?)\s*(?:\\?%|(?:\\(?:text|mathrm)\s*\{)?\s*(?:per ?cent|pct)\s*\}?)")
_POWER = r"(?:\s*\^\s*\{?\s*-?[1-4]\s*\}?)"
_TYPESET_UNIT = re.compile(
    r"(.*?(?:[\d})!]|\\pi))((?:\s*(?:/|\\cdot|\\times|~|\\,)?\s*"
    r"\\(?:text|mathrm|mbox|textrm|textbf|operatorname)\s*"
    rf"\{{(?:[^{{}}\\0-9^]|\\[ ,;]|{_POWER})*\}}{_POWER}?)+)\s*\.?"
)
_DEGREES = re.compile(
    r"(.*?[\d})])(\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*(?:\\(?:text|mathrm)\s*\{)?\s*[CFK]\s*\}?)?)"
)
_SYMBOLS = (
    "[numcdkMG]?(?:m|g|[lL]|s|Hz|N|J|W|V|A|Pa|eV|mol)|in|ft|yd|mi|lbs?|oz|sec|min|hrs?|h|mph|kph"
    "|C|K|F|T|atm|rad|deg|u|sq|cu|of|to|at|on|by|so|as|an?"
)
_WORD = rf"(?:[A-Za-z]{{3,}}(?:-[A-Za-z]{{3,}})?|{_SYMBOLS})\.?{_POWER}?"
_BARE_UNIT = re.compile(
    rf"(.*?[\d}}])((?:\s+{_WORD}|(?<=\d)(?:mm|cm|dm|km|kg|mg|ml|mL|ft|lbs?)(?![a-zA-Z]){_POWER}?)"
    rf"(?:\s*/\s*{_WORD}|\s+{_WORD}){{0,3}})\s*"
)
# Functions, and words that take an answer back.
_NO_UNIT = re.compile(
    r"(?<![a-zA-Z])(?:sin|cos|tan|sec|csc|cot|log|exp|lim|max|min(?=\s*\()|mod|gcd|lcm|sqrt"
    r"|plus|minus|factorial|(?<![a-zA-Z]\s)(?:squared|cubed)|or|and|maybe|perhaps|possibly|probably|either|not|but|wrong|incorrect|false|if|is)(?![a-zA-Z])",
    re.IGNORECASE,
)


_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9} | {
    "trillion": 10**12
}


def _scaled(value: Fraction, unit: str) -> Quantity:
    first, _, rest = unit.partition(" ")
    scale = _SCALES.get(first.lower())
    return Quantity(value, unit) if scale is None else Quantity(value * scale, rest)


def _plain_unit(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mbox|textrm|textbf|operatorname)\s*", "", text)
    text = re.sub(r"\\circ", "degrees", text)
    return " ".join(re.sub(r"[{}~.^]|\\[ ,;]", " ", text).split())


# Spellings, dimension and size of units, some with the prefixes of SI.
_PREFIXES = {"n": -9, "u": -6, "m": -3, "c": -2, "d": -1, "": 0, "k": 3, "M": 6, "G": 9} | dict(
    nano=-9, micro=-6, milli=-3, centi=-2, deci=-1, kilo=3, mega=6, giga=9
)
_METRIC = [
    ("m|met(?:er|re)s?", {"length": 1}, Fraction(1)),
    ("g|grams?", {"mass": 1}, Fraction(1)),
    ("s|secs?|seconds?", {"time": 1}, Fraction(1)),
    ("[lL]|lit(?:er|re)s?", {"length": 3}, Fraction(1, 1000)),
    ("N|[nN]ewtons?", {"mass": 1, "length": 1, "time": -2}, Fraction(1000)),
    ("J|[jJ]oules?", {"mass": 1, "length": 2, "time": -2}, Fraction(1000)),
    ("W|[wW]atts?", {"mass": 1, "length": 2, "time": -3}, Fraction(1000)),
    ("Pa|[pP]ascals?", {"mass": 1, "length": -1, "time": -2}, Fraction(1000)),
    ("Hz|[hH]ertz", {"time": -1}, Fraction(1)),
    ("V|[vV]olts?", {"voltage": 1}, Fraction(1)),
    ("A|[aA]mp(?:ere)?s?", {"current": 1}, Fraction(1)),
    ("ohms?", {"resistance": 1}, Fraction(1)),
    ("eV", {"electronvolts": 1}, Fraction(1)),
    ("mol|moles?", {"amount": 1}, Fraction(1)),
]
_OTHER = [
    ("in|inch|inches", "imperial length", 1),
    ("ft|foot|feet", "imperial length", 12),
    ("yd|yards?", "imperial length", 36),
    ("mi|miles?", "imperial length", 63_360),
    ("oz|ounces?", "weight", 1),
    ("lbs?|pounds?", "weight", 16),
    ("min|mins|minutes?", "time", 60),
    ("h|hrs?|hours?", "time", 3600),
    ("days?", "time", 86_400),
    ("weeks?", "time", 604_800),
    ("arcseconds", "angle", 1),
    ("arcminutes", "angle", 60),
    ("degrees?", "angle", 3600),
    ("rad|radians?", "radians", 1),
    ("cents?", "money", 1),
    ("dollars?|usd", "money", 100),
]
_KNOWN_UNITS = [
    (re.compile(spellings), {kind: 1}, Fraction(size)) for spellings, kind, size in _OTHER
] + [
    (re.compile(f"{prefix}(?:{spellings})"), kinds, size * Fraction(10) ** power)
    for prefix, power in _PREFIXES.items()
    for spellings, kinds, size in _METRIC
]
_ABBREVIATIONS = {"mph": "mi / h", "kwh": "kW h"} | dict.fromkeys(("kph", "kmph", "kmh"), "km / h")
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_UNIT_TOKEN = re.compile(r"[A-Za-z]+|-?\d|/")
_RATE_OF_MONEY = re.compile(r"(cents?|dollars?|) ?(?:/|(?:per|each|an?)\b).*")


@lru_cache(maxsize=4096)
def _measure(unit: str) -> tuple[dict[str, int], Fraction] | None:
    """Dimension and size of a unit such as `km per hour`, `sq cm`, `m s -2`; None if a word is unknown."""
    unit = " ".join(_ABBREVIATIONS.get(word.lower(), word) for word in unit.split())
    dimension: dict[str, int] = {}
    size = Fraction(1)
    for word, power in _factors(_UNIT_TOKEN.findall(unit)):
        known = _known(word) or _known(word.lower())  # `mW` is not `MW`, but `KM` is `km`
        if known is None:
            return None
        for kind, of_kind in known[0].items():
            dimension[kind] = dimension.get(kind, 0) + of_kind * power
        size *= known[1] ** power
    dimension = {kind: power for kind, power in dimension.items() if power}
    return (dimension, size) if dimension else None


def _known(word: str) -> tuple[dict[str, int], Fraction] | None:
    return next((unit[1:] for unit in _KNOWN_UNITS if unit[0].fullmatch(word)), None)


def _factors(tokens: list[str]) -> list[tuple[str, int]]:
    """`m`, `/`, `s`, `2` -> (m, 1), (s, -2)."""
    factors: list[tuple[str, int]] = []
    sign = ahead = 1
    for token in tokens:
        behind = int(token) if token[-1].isdigit() else _POWERS.get(token.lower())
        if token in ("/", "per"):
            sign = -1
        elif behind is None:
            factors.append((token, sign * ahead))
            ahead = 1
        elif token.lower() in ("square", "sq", "cubic", "cu"):
            ahead = behind
        elif factors:
            factors[-1] = (factors[-1][0], factors[-1][1] * behind)
    return factors


_TEMPERATURE = re.compile(r"(?:^|degrees? )(C|F|K)(?:elsius|ahrenheit|elvin)?$")


def in_unit_of(gold: Quantity, found: Quantity) -> Fraction | None:
    """The value of `found` in the gold answer's unit; None where its unit is of another kind.

    A unit that is missing or not well known is that of the other.
    """
    scales = {of[1] for of in (_TEMPERATURE.search(unit) for unit in (gold.unit, found.unit)) if of}
    if len(scales) > 1:
        return None
    of_gold = _measure(gold.unit)
    priced = of_gold is not None and "money" in of_gold[0]
    of_found = _measure(_RATE_OF_MONEY.sub(r"\1", found.unit) if priced else found.unit)
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
    if units[0].startswith("deg"):
        units = [re.sub(r"^(?=min|sec)", "arc", unit) for unit in units]
    known = [_measure(unit) for unit in units]
    if known[0] is None or any(each is None or each[0] != known[0][0] for each in known):
        return None
    sizes = [each[1] for each in known if each]
    if sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum(Fraction(n) * size for n, size in zip(numbers, sizes, strict=True))
    return Quantity(total / sizes[0], units[0].lower())


# --- rational expressions -------------------------------------------------------------------------

_ALLOWED = re.compile(r"(?:[\d\s.+*/^(){}!-]|\\(?:frac|cdot|times|div)(?![a-zA-Z]))+", re.ASCII)
_TOWER = re.compile(r"\^\s*(?:\{[^{}]*\}|\d+)\s*[\^!]")
_IN_PYTHON = [
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"\\frac\s*(\d)(?=\s*[\d{])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"(?<![\d.])(\d+)\s*\\frac", r"mixed(\1)"),
        (r"(\d*)\.(\d+)|(\d+)\.?(?!\d)", lambda m: f"N{m[1] or m[3] or 0}_{m[2] or 0}"),
        (r"\{", "("),
        (r"\}", ")"),
        (r"\^", "**"),
        (r"!", ".factorial "),
        (r"\\cdot|\\times", " * "),
        (r"\\div", "/"),
        (r"\\frac", "fraction"),  # fraction(1)(2)
    )
]
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATIONS[ast.Div] = operator.truediv


class _NotRational(Exception):
    pass


def rational(text: str) -> Fraction | None:
    r"""The value of `3`, `-1,234.5`, `\frac{1}{2^{98}}`, `1\frac{1}{2}`, `6 \cdot 7`, `5!`; else None."""
    value = number(text)
    if value is not None:
        return value
    if len(text) > MAX_CHARS or not _ALLOWED.fullmatch(text) or _TOWER.search(text):
        return None
    if text.count("{") != text.count("}"):
        return None
    for pattern, replacement in _IN_PYTHON:
        text = pattern.sub(replacement, text)
    if max(itertools.accumulate((c == "(") - (c == ")") for c in text)) > MAX_DEPTH:
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (_NotRational, ZeroDivisionError, SyntaxError, ValueError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Name(id=name) if name[0] == "N":
            return Fraction(name[1:].replace("_", "."))
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return -_value(operand) if isinstance(node.op, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.expr() as right):
            return _raised(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left), _value(right)))
        case ast.Attribute(value=ast.Attribute()):
            raise _NotRational  # `3!!` is 3
        case ast.Attribute(value=operand):
            value = _value(operand)
            if value.denominator == 1 and 0 <= value <= 170:
                return Fraction(math.factorial(int(value)))
        case ast.Call(func=ast.Call(func=ast.Name(id="fraction"), args=[above]), args=[below]):
            return _bounded(_value(above) / _value(below))
        case ast.Call(
            func=ast.Call(func=ast.Call(func=ast.Name(id="mixed"), args=[whole]), args=[above]),
            args=[below],
        ):
            part = _value(above) / _value(below)
            if 0 <= part < 1:
                return _value(whole) + part
    raise _NotRational


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS:
        raise _NotRational
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotRational
    return value
