r"""An answer in the form in which its gold answer is written: `2 to 3` where that is `2:3`.

What is ambiguous alone, such as `12,5`, is clear beside a gold answer. Pure standard library.
"""

from __future__ import annotations

import re
from fractions import Fraction

from exgrpo_fast.rewards.verifiers.numerals import number
from exgrpo_fast.rewards.verifiers.quantities import quantity, rational
from exgrpo_fast.rewards.verifiers.words import time_in_form_of

MAX_CHARS = 512


def in_form_of(gold: str, found: str) -> str:
    """`found`, or the same answer as `gold` would write it; both in `notation.latex`."""
    if found == gold or len(found) > MAX_CHARS or len(gold) > MAX_CHARS:
        return found
    if number(gold) is not None and number(found) is not None:
        return found
    for rewrite in (_unnamed, _number, _angle, _time_or_ratio, _structure, _conditions):
        found = rewrite(gold, found)
    return found


_NAMED = re.compile(
    r"^(?!.*\b(?:not?|never|wrong|false)\b)(?:m\s*|\\(?:max|min|deg)\s*)?(?:\([a-zA-Z_,\\ ]+\)|\\(?:vec|hat|bar|overline|overrightarrow|math\w+|text|operatorname|boldsymbol)"
    r"\s*\{[^{}=]*\}|\\(?:angle|triangle)\s*[A-Z]+|\\(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp)\b)"
    r"[a-zA-Z]+|[A-Za-z]{1,3}|\|[A-Za-z]{1,2}\|)(?:_\{[^{}]*\}|_\w|'|\([^()]*\))*\s*=\s*(?=[^=<>]+$)"
)


def _unnamed(gold: str, found: str) -> str:
    """`P(X > 1) = 0.25`, `\\vec{v} = (3, 4)` without the name, unless the gold answer has one."""
    if "i" in gold and "j" not in gold and _WITH_J.fullmatch(found):
        found = found.replace("j", "i")
    if gold.startswith(("(", "\\{(")):
        found = _NAMES.sub("", found)
    if "\\vec" in gold:
        found = _VECTOR.sub(r"\\vec{\1}", found)
    if "=" in gold:
        return found
    found = _NAMED.sub("", found)
    return _POINT.sub("", found) if gold.startswith("(") else found


_NAMES = re.compile(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)\s*(?:=|\\in)\s*")
_WITH_J = re.compile(
    r"(?:[-+\d\s.*/(){}]|\\(?:frac|sqrt|cdot|pi)|j)*j(?:[-+\d\s.*/(){}]|\\(?:frac|sqrt|cdot|pi))*"
)
_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|overrightarrow|vec)\s*\{?\s*([a-zA-Z])(?![a-zA-Z])\s*\}?"
)
_POINT = re.compile(r"(?:^|(?<=[,;]))\s*[A-Z]\s*(?=\([^()]*,)")

# --- numbers --------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"-?\d+\.\d+(?![\d.,])")
_WITH_COMMA = re.compile(r"(-?)(\d+|\d{1,3}(?:\.\d{3})+),(\d+)(?=[^\d.,]*$)")
_SPLIT = re.compile(r"-?(?:0,\d+|\d+,(?!\d{3})\d+)(?:\s*\\?%)?")
_INDIAN = re.compile(r"\d{1,2}(?:,\d\d)+,\d{3}")
_SHORT = re.compile(r"(-?\d+(?:\.\d+)?) ?(k|K|M|B|T|mn|bn)(?: \\text\{ dollars\})?")
_MIXED = re.compile(
    r"(-?\d{1,9})\s*(?:-|\\text\s*\{\s*and(?: an?)?\s*\}|and)\s*"
    r"(?:(\d{1,9})/(\d{1,9})|\\frac\{(\d{1,9})\}\{(\d{1,9})\})"
)


def _number(gold: str, found: str) -> str:
    if _DECIMAL.match(gold) and number(found) is None and (split := _WITH_COMMA.match(found)):
        return f"{split[1]}{split[2].replace('.', '')}.{split[3]}{found[split.end() :]}"
    if _SPLIT.fullmatch(found) and "," not in gold and (value := rational(gold)) is not None:
        point = found.replace(",", ".")
        return point if rational(point.rstrip("\\% ")) in (value, value * 100) else found
    if _INDIAN.fullmatch(found) and number(gold) is not None:
        return found.replace(",", "")
    if (short := _SHORT.fullmatch(found)) and (value := quantity(gold)) and not value.unit:
        size = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[short[2][0].lower()]
        return gold if value.value == Fraction(short[1]) * size else found
    if mixed := _MIXED.fullmatch(found):  # `2-3/4` may also be a difference
        whole, above, below = int(mixed[1]), int(mixed[2] or mixed[4]), int(mixed[3] or mixed[5])
        sign = -1 if mixed[1].startswith("-") else 1
        if above < below and rational(gold) == whole + sign * Fraction(above, below):
            return gold
    return found


# --- angles ---------------------------------------------------------------------------------------

_RADIANS = re.compile(
    r"((?:[-\d\s{}()/.*,]|\\frac|\\cdot|\\times|\\pi)*\\pi(?:[-\d\s{}()/.*,]|\\frac|\\pi)*?)"
    r"\s*(?:\\text\s*\{\s*rad(?:ians?)?\s*\}|rad(?:ians?)?)?"
)
_IMPERIAL = re.compile(r"\b(?:in|inch|inches|ft|foot|feet)\b")
_DEGREE = re.compile(
    r"(-?\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*"
    r"(?:\^\s*\{?\s*\\circ\s*\}?|(?:\\text\s*\{\s*)?degrees?\s*\}?)"
)
_DEGREES = re.compile(r"(.*\d.*?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|(?:\\text\s*\{\s*)?degrees?\s*\}?)")


def _angle(gold: str, found: str) -> str:
    if _DEGREES.fullmatch(gold) and (radians := _RADIANS.fullmatch(found)):
        return re.sub(r"(?<=[\d})])\s*\\pi", r"\\cdot 180", radians[1]).replace(r"\pi", "180")
    if r"\pi" in gold and r"\circ" not in gold:
        return _DEGREE.sub(r"\\frac{\1 \\cdot \\pi}{180}", found)
    if _IMPERIAL.search(gold) and found.endswith("'"):
        return f"{found[:-1]} ft"
    if _DEGREES.fullmatch(gold) and found.endswith("'"):
        return f"{found[:-1]} arcminutes"
    return found


# --- times and ratios -----------------------------------------------------------------------------

_CLOCK = re.compile(r"^(\d{1,2}):([0-5]\d)$")
_TERM = r"(?:\d+(?:\.\d+|/\d+)?|\\frac\{\d+\}\{\d+\})"
_RATIO = re.compile(rf"{_TERM}(?:\s*:\s*{_TERM})+")
_TO = re.compile(r"\s*(?:\\text\s*\{\s*(?:is )?to\s*\}|(?<=\d)\s+to(?=\s+\d))\s*")


def _time_or_ratio(gold: str, found: str) -> str:
    found = time_in_form_of(gold, found)
    if "hour" in gold and "min" in gold:
        found = _CLOCK.sub(r"\1 hours \2 minutes", found)
    if _RATIO.fullmatch(gold):
        found = _TO.sub(":", found)
        if gold.count(":") == found.count(":") > 1 and _RATIO.fullmatch(found):
            # math-verify would divide from left to right.
            return gold if _reduced(found) == _reduced(gold) else "not proportional"
    return found


def _reduced(ratio: str) -> list[Fraction | None]:
    terms = [rational(term.strip()) or Fraction(0) for term in ratio.split(":")]
    return [term / terms[0] if terms[0] else None for term in terms[1:]]


# --- tuples, systems, matrices, unions ------------------------------------------------------------

_COLUMN = re.compile(r"(\\begin\{[pb]matrix\})([^&]*)(\\end\{[pb]matrix\})")
_ONE_ROW = re.compile(r"(\\begin\{[pb]matrix\})((?:(?!\\\\).)*)\\end\{[pb]matrix\}")
_TUPLE = re.compile(r"\(([^()]*,[^()]*)\)")
_SET_OF_ONE_TUPLE = re.compile(r"\\\{\s*(\([^()]*\))\s*\\\}")
_LIST, _SPACED = re.compile(r"\[[^][]*,[^][]*\]"), re.compile(r"-?\d+(?: -?\d+)+")
_ROW = re.compile(r"\[([^][]*)\]")
_BETWEEN_INTERVALS = re.compile(
    r"(?<=[\])])\s*(?:U|,|(?:\\text\s*\{\s*)?(?:or|and)(?:\s*\})?)\s*(?=[\[(])"
)


def _structure(gold: str, found: str) -> str:
    if gold == r"\mathbb{R}" and found == "R":
        return gold
    if _LIST.fullmatch(gold) and _SPACED.fullmatch(found):
        return f"[{', '.join(found.split())}]"
    if "\\cup" in gold:
        found = _BETWEEN_INTERVALS.sub(r" \\cup ", found)
    if "matrix}" in gold and found.startswith("[["):
        rows = [row.replace(",", " & ") for row in _ROW.findall(found)]
        return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
    if (column := _COLUMN.fullmatch(gold)) and (entries := _TUPLE.fullmatch(found)):
        return column[1] + entries[1].replace(",", r"\\") + column[3]
    if "_" not in gold:
        found = _roots(found)
    if names := _assigned(gold):
        return _with_names(names, found)
    if not _TUPLE.fullmatch(gold):
        return found
    if vector := _COLUMN.fullmatch(found) or _ONE_ROW.fullmatch(found):
        return f"({vector[2].replace(chr(92) * 2, ',').replace('&', ',')})"
    if one := _SET_OF_ONE_TUPLE.fullmatch(found):
        return one[1]
    values = _assigned(found)
    ordered = sorted(values) if _neighbours(list(values)) else values
    return f"({', '.join(values[name] for name in ordered)})" if values else found


_ASSIGNMENT = re.compile(r"([a-zA-Z](?:_\{?\w\}?)?)\s*=([^=]+)")
_ROOTS = re.compile(r"[,;]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\lor")
_COMMA = re.compile(r"[,;]|\\text\s*\{\s*and\s*\}|\band\b")


def _roots(text: str) -> str:
    """`x_1 = 1 \\text{ or } x_2 = 5` as `1, 5`; any other text as it is."""
    parts = [_ASSIGNMENT.fullmatch(part.strip()) for part in _ROOTS.split(text)]
    names = {part and part[1][0] for part in parts}
    if len(parts) < 2 or len(names) > 1 or None in names:
        return text
    return ", ".join(part[2].strip() for part in parts if part)


def _assigned(text: str) -> dict[str, str]:
    """`x = 2, y = 5` as names and values; empty for anything else."""
    parts = [_ASSIGNMENT.fullmatch(part.strip()) for part in _COMMA.split(text)]
    values = {part[1]: part[2].strip() for part in parts if part}
    return values if len(values) == len(parts) > 1 else {}


def _with_names(gold: dict[str, str], found: str) -> str:
    """Values in the order of the gold answer's names."""
    values, entries = _assigned(found), _TUPLE.fullmatch(found)
    if entries and len(parts := entries[1].split(",")) == len(gold):
        values = dict(zip(gold, (part.strip() for part in parts), strict=True))
    if set(values) != set(gold):
        return found
    return ", ".join(f"{name} = {values[name]}" for name in gold)


def _neighbours(names: list[str]) -> bool:
    """Whether the names follow each other in the alphabet, as x and y do, and m and b do not."""
    codes = sorted(ord(name) for name in names if len(name) == 1)
    return len(codes) == len(names) > 1 and codes[-1] - codes[0] == len(codes) - 1


# --- what is said beside it -----------------------------------------------------------------------

_MODULUS = re.compile(r"(?:([a-z])\s*\\equiv)?\s*(.+?)\s*\\p?mod\s*(?:\{\s*(\d+)\s*\}|(\d+))\s*")
_CLASS = re.compile(
    r"([a-z]\s*=\s*)?(?:(\d+)\s*([knmt])\s*\+\s*(\d+)|(\d+)\s*\+\s*(\d+)\s*([knmt]))"
)


def _congruence(text: str) -> str:
    """`x = 12k + 5` as `5 \\pmod{12}`."""
    of = _CLASS.fullmatch(text)
    return rf"{of[4] or of[5]} \pmod {{{of[2] or of[6]}}}" if of else text


def _residue(of: re.Match[str]) -> tuple[int, int] | None:
    modulus = int(of[3] or of[4])
    return (int(of[2]) % modulus, modulus) if of[2].isdecimal() and modulus else None


_EQUIVALENT = re.compile(r"^[a-z]?\s*\\equiv\s*")
_CONSTANT = re.compile(r"\+\s*(?:[CcKk]|\\text\s*\{\s*const(?:ant)?\.?\s*\})$")  # of integration
_FUNCTION = re.compile(
    r"^(?:y(?:\([a-z]\))?\s*=|[fgh]\(([a-z])\)\s*=|(?:[fgh]\s*:\s*)?([a-z])\s*\\(?:mapsto|to|rightarrow)(?![a-zA-Z]))\s*"
)
_ORDER = re.compile(r"[<>]|\\[lgn]eq")
_EXCEPTION = re.compile(r"\s*,\s*([a-z])\s*(?:\\[lgn]eq|[<>])\s*[-\d]+$")


def _conditions(gold: str, found: str) -> str:
    of_gold = _MODULUS.fullmatch(gold)
    of_found = _MODULUS.fullmatch(_congruence(found))
    if of_gold and found == of_gold[2]:
        return gold
    if of_gold and of_found and _residue(of_gold) == _residue(of_found) is not None:
        return gold
    if of_gold and of_found:
        found = f"{gold[: of_gold.start(2)]}{of_found[2]} \\pmod{{{of_found[3] or of_found[4]}}}"
    elif of_found and "\\pmod" in found:
        found = _EQUIVALENT.sub("", of_found[2])
    if _CONSTANT.search(gold):
        found = _CONSTANT.sub("+C", found)
    of_gold, of_found = _FUNCTION.match(gold), _FUNCTION.match(found)
    if of_gold and of_found and not set("y=") & set(gold[of_gold.end() :]):
        body = found[of_found.end() :]
        own, other = (of[1] or of[2] or "x" for of in (of_found, of_gold))
        if own == other or other not in body:  # `f(t) = x`
            found = of_gold[0] + re.sub(rf"(?<![a-zA-Z\\]){own}(?![a-zA-Z])", other, body)
    exception = _EXCEPTION.search(found)
    if exception is None or exception[1] not in gold or _ORDER.search(gold):
        return found
    return found[: exception.start()]
