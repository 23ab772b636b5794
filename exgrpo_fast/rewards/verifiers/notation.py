r"""One notation for what people write in many: `½`, `√2`, `1 000`, `0.\overline{3}`, `– 5` -> LaTeX.

Nothing here changes what an answer says. Pure standard library; linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from exgrpo_fast.rewards.verifiers.number_words import in_digits
from exgrpo_fast.rewards.verifiers.numerals import plain_form

MAX_CHARS = 2048  # a longer text is not read but refused

# --- characters -----------------------------------------------------------------------------------

_SIGNS = {
    "∞": r"\infty ",
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "≤": r"\leq ",
    "⩽": r"\leq ",
    "≥": r"\geq ",
    "⩾": r"\geq ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    "∈": r"\in ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "€": "",
    "£": "",
    "¥": "",
    "₹": "",
    "“": '"',
    "”": '"',
    "’": "'",
    "‐": "-",
    "‑": "-",
    "‒": "-",
    "﹣": "-",
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}


def _character(character: str) -> str:
    if character.isascii():
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    if "\uff01" <= character <= "\uff5e":  # full width
        return chr(ord(character) - 0xFEE0)
    name = unicodedata.name(character, "")
    if name.startswith("VULGAR FRACTION"):
        above, bar, below = unicodedata.normalize("NFKC", character).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}" if bar and below else character
    if match := _GREEK.fullmatch(name):
        letter = match[2].lower().replace("lamda", "lambda")
        return f"\\{letter if match[1] == 'SMALL' else letter.capitalize()} "
    return character


_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")

# --- words and typesetting ------------------------------------------------------------------------

_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|sec|csc|cot|ln|log|exp|pi"
_Replacement = str | Callable[[re.Match[str]], str]


def _repeating(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` as a fraction: (16 - 1) / 90."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    below = 10 ** len(fixed) * (10 ** len(period) - 1)
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{below}}}"


def _base(match: re.Match[str]) -> str:
    r"""`(1011)_{\text{two}}` as `1011_{2}`."""
    base = in_digits(match[2])
    return f"{match[1]}_{{{base}}}" if base.isdecimal() else match[0]


def _column(match: re.Match[str]) -> str:
    """`(1, 2)^T`."""
    rows = r" \\ ".join(match[1].split(","))
    return rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"


def _half_open(match: re.Match[str]) -> str:
    """`[1, 4[`, as half-open intervals are written in France, as `[1, 4)`."""
    opening, closing = "(" if match[1] == "]" else "[", ")" if match[4] == "[" else "]"
    return f"{opening}{match[2]}, {match[3]}{closing}"


def _mixed(match: re.Match[str]) -> str:
    proper = int(match[2]) < int(match[3])
    return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}" if proper else match[0]


_REWRITES: list[tuple[re.Pattern[str], _Replacement]] = [
    # An en dash between digits is a range; elsewhere it is a minus sign.
    (re.compile(r"(?<!\d)[–—]|[–—](?!\d)"), "-"),
    (re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+"), lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}"),
    (re.compile("[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}"),
    (
        re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))"),
        lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3] or m[4]}}}",
    ),
    (
        re.compile(
            r"\\(?:large|Large|LARGE|huge|Huge|small|displaystyle|textstyle|bf|rm|it)(?![a-zA-Z])"
        ),
        " ",
    ),
    (re.compile(r"\\cfrac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"(?:\^\s*)?\\deg(?:rees?)?(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\\num\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\text\s*\{\s*:\s*\}"), ":"),
    (re.compile(":="), "="),
    (re.compile(r"\\checkmark(?![a-zA-Z])|\\[hv]space\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"^([^*]*[\w)}])\s*\*\*\s*(-?\d+|[a-zA-Z])(?!.*\*\*)"), r"\1^{\2}"),
    (re.compile(r"^([^=<>]*\d[^=<>]*?)\s*=\s*([a-zA-Z])$"), r"\2 = \1"),
    (
        re.compile(r"^[(\[]([^][()]*,[^][()]*)[)\]]\s*\^\s*\{?\s*(?:T|\\top)\s*\}?$"),
        _column,
    ),
    (re.compile(r"\(\s*\\text\s*\{([^{}\d]*)\}\s*\)$"), r"\\text{ \1}"),
    (
        re.compile(r"^(\d{1,9})\s*(?:\\text\s*\{\s*)?(?:in|out of)(?:\s*\})?\s*(\d{1,9})$"),
        r"\\frac{\1}{\2}",
    ),
    (  # 21st, 3^{\text{rd}}
        re.compile(
            r"^(\d{1,9})\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?:st|nd|rd|th)\s*\}{0,2}$"
        ),
        r"\1",
    ),
    (
        re.compile(r"^\d{1,3}(?:\.\d{3}){2,}$|^\d{1,3}(?:_\d{3})+$"),
        lambda m: re.sub("[._]", "", m[0]),
    ),
    (re.compile(r"\\langle(?![a-zA-Z])(.*)\\rangle(?![a-zA-Z])"), r"(\1)"),
    (re.compile(r"\\leqslant(?![a-zA-Z])"), r"\\leq"),
    (re.compile(r"\\geqslant(?![a-zA-Z])"), r"\\geq"),
    (re.compile(r"\\mathrm\s*\{([ied])\}"), r"\1"),
    (re.compile(r"\+\s*\(\s*-\s*([\w.]+)\s*\)"), r"-\1"),
    (re.compile(r"\\log_\{?e\}?(?![a-zA-Z])"), r"\\ln"),
    (re.compile(r"\\([dt]?binom)(\d)(\d)"), r"\\\1{\2}{\3}"),
    (re.compile(r"\\frac\s*([\da-z])\s*([\da-z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"^\s*\\text\s*\{[^{}\d]*(?:\bis|[:=])\s*\}\s*:?"), ""),
    (re.compile(r"(\\sqrt\[\d+\])\s*(\d|[a-z])"), r"\1{\2}"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![\\a-zA-Z.])({_FUNCTIONS})(?![a-zA-Z{{}}])"), r"\\\1"),
    (re.compile(r"\^\{(-?\d*)\.(\d)\}"), lambda m: _power(m)),
    (
        re.compile(
            r"(?<!\d)(\d{0,9})\.(\d{0,9}?)(?:(\d)\3{2,20}|(\d{2,9}?)\4{1,9})"
            r"\s*(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.|…)"
        ),
        lambda m: rf"{m[1]}.{m[2]}\overline{{{m[3] or m[4]}}}",
    ),
    (re.compile(r"(?<!\d)(\d{0,9})\.(\d{0,9})\((\d{1,9})\)"), r"\1.\2\\overline{\3}"),
    (re.compile(r"(\d*)\.(\d{0,9})\\(?:overline|bar|dot)\s*\{(\d{1,9})\}"), _repeating),
    (re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]+\}"), ""),
    (re.compile(r"\\\\\s*\[\d+\s*(?:pt|em|ex|mm)\]"), r"\\\\"),  # space below a row
    (re.compile(r"\\colon(?![a-zA-Z])|\{:\}"), ":"),
    (
        re.compile(
            r"(\d{1,2}:\d\d)\s*(?:\\text\s*\{\s*)?([AaPp])\.?\s?[Mm]\.?(?:\s*\})?(?![a-zA-Z])"
        ),
        lambda m: f"{m[1]} {m[2].upper()}M",
    ),
    (re.compile(r"(?<![a-zA-Z\\])C\s*\((\d{1,4})\s*,\s*(\d{1,4})\)"), r"\\binom{\1}{\2}"),
    (
        re.compile(
            r"^\(?([0-9A-F]+)\)?_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\(?([a-z]+|\d{1,2})\)?\}{0,2}$"
        ),
        _base,
    ),
    (re.compile(r"^(?=\]|.*\[$)([][])([^][();,]+)[,;]([^][();,]+)([][])$"), _half_open),
    (
        re.compile(
            r"^\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{R\})?\s*(?::|\\mid|\|)(.*(?:[<>]|\\[lg]e).*)\\\}$"
        ),
        r"\2",
    ),
    (
        re.compile(
            r"\\frac\s*\{(\\(?:text|mathrm)\{[a-zA-Z ]+\})\}\s*"
            r"\{(\\(?:text|mathrm)\{[a-zA-Z ]+\}(?:\^\{?[1-4]\}?)?)\}"
        ),
        r"\1/\2",
    ),
    (
        re.compile(r"(?<![\d.,])\d{1,3}(?:[ ']\d{3})+(?![\d/'])"),
        lambda m: re.sub("[ ']", "", m[0]),
    ),
    (re.compile(r"(?<![\d./^_{])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d./])"), _mixed),
    (re.compile(r"^\s*(?:\\(?:approx|simeq|approxeq|sim)(?![a-zA-Z])|~)\s*"), ""),
    (
        re.compile(
            r"^\s*(?:\\text\s*\{\s*)?(?:approximately|approx\.?|about|roughly)(?:\s*\}\s*|\s+)(?=[-\d\\.])"
        ),
        "",
    ),
]


def _power(match: re.Match[str]) -> str:
    digits = int(f"{match[1].lstrip('-') or 0}{match[2]}")
    sign = "-" if match[1].startswith("-") else ""
    return rf"^{{{sign}\frac{{{digits}}}{{10}}}}"


_WHOLE = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|underline)"
    r"\s*\{([^{}\\]*)\}"
)


@lru_cache(maxsize=16_384)
def latex(text: str) -> str:
    """The text in plain LaTeX; one that is too long to be an answer as it is."""
    if len(text) > MAX_CHARS:
        return text
    text = "".join(map(_character, plain_form(text)))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    whole = _WHOLE.fullmatch(text)
    text = in_digits((whole[1] if whole else text).strip().strip('"').strip())
    return _PHRASES.get(text.casefold().rstrip("."), text)


_PHRASES = {
    "all real numbers": r"\mathbb{R}",
    "all reals": r"\mathbb{R}",
    "the empty set": r"\emptyset",
    "empty set": r"\emptyset",
    "infinity": r"\infty",
    "dne": "does not exist",
}


# --- comparisons of text --------------------------------------------------------------------------

_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}\\]*)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}(?:[ -][A-Za-z]+)*|[Nn]o")

_ARTICLE = re.compile(r"^(?:the|an?) ")
_YES_OR_NO = re.compile(r"(yes|no)[.,;:!] ")
_TAKEN_BACK = re.compile(r"\b(?:yes|no|not|but|or|maybe|perhaps)\b|n't\b")


def same_text(found: str, gold: str) -> bool:
    """Whether two answers in one notation read the same, but for spaces and, in words, capitals."""
    # A run of spaces is one, so that none of it is left between two digits.
    found, gold = (" ".join(text.split()) for text in (found, gold))
    if _SPACE.sub("", found) == _SPACE.sub("", gold):
        return True
    found, gold = (_TEXT.sub(r"\1", text) for text in (found, gold))
    if _SPACE.sub("", found) == _SPACE.sub("", gold):
        return True
    found = found.rstrip(".")
    if _WORDS.fullmatch(gold) is None:
        return False
    found, gold = (_ARTICLE.sub("", text.casefold()) for text in (found, gold))
    if gold in ("yes", "no") and (said := _YES_OR_NO.match(found)):
        return said[1] == gold and not _TAKEN_BACK.search(found[said.end() :])
    return found.removesuffix("s") == gold.removesuffix("s")  # `no solutions`


# --- inequalities ---------------------------------------------------------------------------------

_LESS, _MORE = r"<|\\leq?(?![a-zA-Z])|\\lt(?![a-zA-Z])", r">|\\geq?(?![a-zA-Z])|\\gt(?![a-zA-Z])"
_HALF_LINE = re.compile(rf"[a-z]\s*({_LESS}|{_MORE})\s*([^<>=,;]+)")
_OR = re.compile(r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|\bor\b|\\lor|\\vee)\s*")


def as_union(text: str) -> str:
    r"""`x < 2 or x \geq 3` as `(-\infty, 2) \cup [3, \infty)`; any other text as it is."""
    parts = [_HALF_LINE.fullmatch(part.strip()) for part in _OR.split(text)]
    if len(parts) < 2 or not all(parts):
        return text
    return r" \cup ".join(_interval(part[1], part[2].strip()) for part in parts if part)


def _interval(relation: str, bound: str) -> str:
    closed = relation.startswith(("\\le", "\\ge"))
    if re.fullmatch(_LESS, relation):
        return rf"(-\infty, {bound}{']' if closed else ')'}"
    return rf"{'[' if closed else '('}{bound}, \infty)"
