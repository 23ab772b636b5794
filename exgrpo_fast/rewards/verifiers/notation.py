r"""One notation for what people write in many: `½`, `√2`, `1 000`, `0.\overline{3}`, `– 5` -> LaTeX.

Nothing here changes what an answer says. Pure standard library; linear in the length of the text.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from exgrpo_fast.rewards.verifiers.intervals import half_open_as_in_english
from exgrpo_fast.rewards.verifiers.numerals import WRAPPED, plain_form
from exgrpo_fast.rewards.verifiers.words import as_date, as_time, in_digits

MAX_CHARS = 2048  # a longer text is not read but refused

# --- characters -----------------------------------------------------------------------------------

_COMMAND_OF = (
    "∞ infty,× times,⋅ cdot,· cdot,∙ cdot,∨ lor,∧ land,≤ leq,⩽ leq,≥ geq,⩾ geq,≠ neq,≈ approx,± pm,"
    "∪ cup,∩ cap,∅ emptyset,∈ in,≡ equiv"
)
_SIGNS = {pair[0]: f"\\{pair[2:]} " for pair in _COMMAND_OF.split(",")}
_SIGNS |= dict(zip("∶÷∕⁄、“”’′″‐‑‒﹣", ':///,""\'\'"----', strict=True)) | dict.fromkeys("€£¥₹", "")
_SIGNS |= {"°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "‰": r"\text{ permille}"}
_SIGNS |= {"¢": " cents", "或": r"\text{ or }", "和": r"\text{ and }"}
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

# Commands by the name that the rest of this package knows, and those that say nothing.
_COMMANDS = {
    name: meaning
    for names, meaning in (
        ("cfrac sfrac xfrac nicefrac", r"\frac"), ("lbrace", r"\{"), ("rbrace", r"\}"),
        ("cr newline", r"\\"), ("varnothing O", r"\emptyset"), ("le leqslant leqq", r"\leq"),
        ("ge geqslant geqq", r"\geq"), ("ne", r"\neq"), ("bigcup", r"\cup"), ("wedge", r"\land"),
        ("backslash smallsetminus", r"\setminus"), ("vee", r"\lor"), ("tg", r"\tan"),
        ("implies Longrightarrow", r"\Rightarrow"), ("simeq approxeq", r"\approx"),
        ("ctg cotg", r"\cot"), ("arctg", r"\arctan"), ("lg", r"\log"), ("bmod", r"\mod"),
        ("colon", ":"), ("imath", "i"), ("varepsilon", r"\epsilon"), ("varphi", r"\phi"),
        ("large Large LARGE huge Huge small displaystyle textstyle bf rm it mathstrut", " "),
        ("checkmark blacksquare square", " "), ("cancel bcancel xcancel", ""),
        ("textdollar mathdollar", ""),
    )
    for name in names.split()
}  # fmt: skip
# --- words and typesetting ------------------------------------------------------------------------

_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|sec|csc|cot|ln|log|exp|pi"
_OPEN, _CLOSE = r"(?:\\(?:text|mbox|mathrm)\s*\{\s*)?", r"(?:\s*\})?"
_REAL = r"\\in\s*\\mathbb\s*\{[RZN]\}(?:[_^]\{?(?:[+*0-]|> ?0)\}?)?"
_Replacement = str | Callable[[re.Match[str]], str]


def _repeating(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` as a fraction: (16 - 1) / 90."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    below = 10 ** len(fixed) * (10 ** len(period) - 1)
    return rf"\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{below}}}"


def _base(match: re.Match[str]) -> str:
    r"""`(1011)_{\text{two}}`, `1011 (base 2)` as `1011_{2}`."""
    base = in_digits(match[2] or match[4])
    return f"{match[1] or match[3]}_{{{base}}}" if base.isdecimal() else match[0]


def _column(match: re.Match[str]) -> str:
    """`(1, 2)^T`."""
    rows = r" \\ ".join(match[1].split(","))
    return rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"


_UNIT_VECTOR = r"\\(?:mathbf|hat|vec|boldsymbol|bm)\s*\{?\s*(?:\\(?:mathbf|boldsymbol)\s*\{)?\s*\\?([ijk])(?:math)?\}*"


def _vector(match: re.Match[str]) -> str:
    r"""`3\mathbf{i} - \mathbf{k}` as `(3, 0, -1)`."""
    terms = re.findall(rf"([-+]?[^-+]*?){_UNIT_VECTOR}", match[0])
    parts = {
        name: re.sub(r"^([-+]?)$", r"\g<1>1", c.replace(" ", "")).lstrip("+") for c, name in terms
    }
    if len(parts) != len(terms):
        return match[0]
    return f"({', '.join(parts.get(name, '0') for name in ('ijk' if 'k' in parts else 'ij'))})"


def _ways(match: re.Match[str]) -> str:
    """`C(8, 3)`, `_8P_3`, `8C3`, `C_8^3`."""
    things, taken = (group for group in match.groups() if group and group not in "CP")
    if "C" in match.groups():
        return rf"\binom{{{things}}}{{{taken}}}"
    return rf"\frac{{{things}!}}{{({things}-{taken})!}}"


def _system(match: re.Match[str]) -> str:
    """The rows of a system as a list of equations; of a piecewise function with bare conditions."""
    rows = [row.strip().rstrip(",.;") for row in match[2].split(r"\\") if row.strip()]
    if all(_EQUATION.fullmatch(row) for row in rows):
        return ", ".join(row.replace("&", "") for row in rows)
    rows = [_CONDITION.sub(" & ", row) for row in rows]
    return rf"\begin{{{match[1]}}}" + r" \\ ".join(rows) + rf"\end{{{match[1]}}}"


_EQUATION = re.compile(r"\s*[a-zA-Z]\w?\s*&?\s*=[^=&]+")
_CONDITION = re.compile(
    r"\s*,?\s*&\s*(?:\\text\s*\{\s*(?:if|for|when)?\s*\}|(?:if|for|when)\b)?\s*"
)


def _parts(match: re.Match[str]) -> str:
    """`(a) 3, (b) 5` as `(3, 5)`."""
    _, *pieces = _LABEL.split(match[0])
    labels, values = pieces[::2], [value.strip(" ,;") for value in pieces[1::2]]
    known = [names[: len(labels)] for names in (_LETTERS, _ROMAN)]
    if len(labels) < 2 or not all(values) or labels not in known:
        return match[0]
    return f"({', '.join(values)})"


_LETTERS, _ROMAN = ["a", "b", "c", "d"], ["i", "ii", "iii", "iv"]
_LABEL = re.compile(
    rf"(?:\\text\s*\{{[\s,;]*)?(?<![\w(])\(?(?<!\w)([a-d]|i{{1,3}}|iv)\){_CLOSE}\s*"
)


def _turned(match: re.Match[str]) -> str:
    """`12 = x + y` as `x + y = 12`."""
    left, right = (_VARIABLE.search(side) for side in (match[1], match[2]))
    return f"{match[2].strip()} = {match[1].strip()}" if right and not left else match[0]


_VARIABLE = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])")


def _mixed(match: re.Match[str]) -> str:
    proper = int(match[2]) < int(match[3])
    return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}" if proper else match[0]


# What stands before a number and makes another answer of it.
_CHANGES = re.compile(
    r"\b(?:no[tr]?|never|nobody|none|nothing|wrong|false|incorrect|minus|negative|plus|less|more|fewer"
    r"|greater|smaller|larger|bigger|least|most|than|under|over|above|below|between|until|till|before"
    r"|half|third|quarter|twice|thrice|double|triple|times|square|cubed?|root|logarithm|base|power|out"
    r"|factorial|divided|multiplied|or|and|but|except|unless|if|maybe|perhaps|possibly|probably|either"
    r"|neither|know|guess|\w+n't|another|without|instead|almost|nearly|modulo|multiple|from|up|next|close|per|option"
    r"|(?:sum|product|difference|quotient|factors?|divisors?) of"
    r"|jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
    r"|sqrt|cbrt|cis|lim|max|min|mod|gcd|lcm|det|arg|deg|tanh|sinh|cosh)\b",
    re.IGNORECASE,
)


_CHINESE_UNITS = (
    "平方 square_,立方 cubic_,分钟 min,小时 hours,天 days,千米 km,公里 km,厘米 cm,毫米 mm,分米 dm,米 m,"
    "度 degrees,千克 kg,公斤 kg,克 g,毫升 ml,升 l,秒 s,分 min"
)
_CHINESE = {name: unit for name, _, unit in (u.partition(" ") for u in _CHINESE_UNITS.split(","))}


def _chinese(match: re.Match[str]) -> str:
    unit = re.sub("|".join(_CHINESE), lambda m: _CHINESE[m[0]], match[1]).replace("_", " ")
    return rf"\text{{ {unit} }}"


# Applied in this order to the whole text.
# fmt: off
_REWRITES: list[tuple[re.Pattern[str], _Replacement]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # --- signs. An en dash between digits is a range; elsewhere it is a minus sign.
        (r"(?<!\d)[–—]|[–—](?!\d)", "-"),
        ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}"),
        ("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}"),
        (r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))",
         lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3] or m[4]}}}"),
        ("(?:\\d\u0305)+", lambda m: rf"\overline{{{m[0][::2]}}}"),
        # --- typesetting
        (rf"\\(?:operatorname\*?|text|mathrm)\s*\{{\s*({_FUNCTIONS}|arc[a-z]+|c?tg|cis)\s*\}}", r"\\\1"),
        (r"\\([a-zA-Z]+)", lambda m: _COMMANDS[m[1]] if m[1] in _COMMANDS else m[0]),
        (r"\\?(?<![a-zA-Z])cis\s*((?:\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\([^()]*\)|\d+|\\?[a-zA-Z]+)(?:\s*\^\s*\{?\s*\\circ\s*\}?)?)",
         lambda m: rf"(\cos{{({m[1]})}} + i \sin{{({m[1]})}})"),
        (r"^([*_`]{1,3})([^*_`]+)\1$", r"\2"),
        (r"\\[bB]igg?[lrm]?(?=\s*[][(){}|\\])|\\(?:[hv]space\*?|[hv]?phantom|(?:text)?color)\s*\{[^{}]*\}"
         r"|^\\#|\\bbox(?:\[[^][]*\])?", " "),
        (r"^\s*(?:\\(?:therefore|Rightarrow)(?![a-zA-Z])|=)\s*", ""),
        (r"\\(begin|end)\s*\{smallmatrix\}", r"\\\1{matrix}"),
        (r"(?:\\\\\s*)+\[\d+\s*(?:pt|em|ex|mm)\]|\\\\\s*\\\\", r"\\\\"),
        (r"[\[(]?\s*\\begin\s*\{array\}\s*\{[lcr| ]*\}(.*)\\end\s*\{array\}\s*[\])]?",
         r"\\begin{pmatrix}\1\\end{pmatrix}"),
        (r"^\\\{\s*\\\}$", r"\\emptyset"),
        (r"(?:\^\s*|(?<=[\d})])\s*)\\deg(?:rees?)?(?![a-zA-Z])", r"^\\circ"),
        (r"\^\s*\{?\s*((?:\\prime\s*)+)\}?", lambda m: "'" * m[1].count("prime")),
        (r"(?<=\d)\s*'\s*'", '"'),
        (r"\\num\s*\{([^{}]*)\}", r"\1"),
        (r"(?:\\text\s*)?\{\s*([,;:])\s*(?:and\s*)?\}", r"\1"),
        (":=", "="),
        (r"\\langle(?![a-zA-Z])(.*)\\rangle(?![a-zA-Z])", r"(\1)"),
        (r"\\mathrm\s*\{([iedE])\}", r"\1"),
        (r"\\math(?:bb|bf|ds)\s*\{?\s*([RZNQ])\s*\}?(?![a-zA-Z])", r"\\mathbb{\1}"),
        (r"^<([^<>]*,[^<>]*)>$", r"(\1)"),
        (r"\\text\s*\{\s*\\?%\s*\}", r"\\%"),
        (r"\\&", r"\\text{ and }"),
        (r"(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|\{?\s*\\(?:text|mathrm)\s*\{\s*o\s*\}\}?|o(?![a-z]))", r"^\\circ"),
        (rf"(?<![\d.])(-?\d+(?:\.\d+)?)\s*{_OPEN}per ?mille?{_CLOSE}$", r"\\frac{\1}{1000}"),
        (r"\\log_\{?e\}?(?![a-zA-Z])", r"\\ln"),
        (r"\\([dt]?binom)(\d)(\d)", r"\\\1{\2}{\3}"),
        (r"\\frac\s*(\\pi|[\da-z])\s*([\da-z])", r"\\frac{\1}{\2}"),
        (r"(\\sqrt\[\d+\])\s*(\d|[a-z])", r"\1{\2}"),
        (r"(?:\\|(?<![\\a-zA-Z]))sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?:times )?(?:the )?square root of (\d+)", r"\\sqrt{\1}"),
        (r"(?<=\d)\s*\\text\s*\{\s+\}(?=\d)", " "),
        (r"(?<![\\a-zA-Z])cbrt\s*\(([^()]*)\)", r"\\sqrt[3]{\1}"),
        (r"(?<=[a-z])/sec(?![a-zA-Z(])", "/s"),
        (rf"(?<![\\a-zA-Z.])({_FUNCTIONS})(?![a-zA-Z{{}}])", r"\\\1"),
        (r"\\frac\s*\{(\\(?:text|mathrm)\{[a-zA-Z ]+\})\}\s*"
         r"\{(\\(?:text|mathrm)\{[a-zA-Z ]+\}(?:\^\{?[1-4]\}?)?)\}", r"\1/\2"),
        # --- words around the answer
        (r"^\\text\s*\{\s*[Aa]ll\s*\}\s*(?:[a-z]\s*\\text\s*\{\s*(?:with|such that|satisfying)\s*\})?", ""),
        (r"^\s*(?:\\approx(?![a-zA-Z])|~)\s*", ""),
        (r"^\s*\\(?:text|mbox|mathrm)\s*\{(?P<stated>[^{}\d]*(?:\bis|[:=])\s*\}\s*:?|[A-Za-z ]*\}\s*[=:])"
         r"|^\s*\\(?:text|mbox|mathrm)\s*\{\s*(?:[Aa]n?|[A-Za-z' -]*[a-z]{2}[A-Za-z' -]*)\s*\}\s*"
         r"(?=[-\d.(\[|]|\\(?:frac|sqrt|pi|[{$])|[a-zA-Z]\s*=)"
         r"|^((?:[A-Za-z][A-Za-z']* ){2,8}|(?:[A-Za-z]{4,}|[Ii][ns]|[Aa]n?|are|has|[ABab][tyD]|[Oo]n) )"
         r"(?=-?[\d.$]|-?\\(?:frac|sqrt|pi|[{$]))",
         lambda m: m[0] if _CHANGES.search(m[0]) or any(in_digits(w) != w for w in re.findall("[a-z]+", m[0])) else ""),
        (rf"^{_OPEN}(?:minus|negative){_CLOSE}\s*(?=\d|\\frac)", "-"),
        (rf"^{_OPEN}(?:US|USD|EUR|GBP|INR|CHF|JPY|CNY|RMB|CAD|AUD|Rp|Rs\.?|\\(?:pounds|euro|texteuro))"
         rf"(?![a-z]){_CLOSE}\s*(?=\d)|(?<=\d)\s*/-$", ""),
        (r"\(\s*\\text\s*\{([^{}\d]*)\}\s*\)$", r"\\text{ \1}"),
        (r"\\text\s*\{\s*or (?:about|approximately)\s*\}", r"\\approx "),
        (r"\\text\s*\{\s*(?:(ou|oder|o)|et|und|e|y)\s*\}|(?<=[\s\d])(ou|oder)(?=\s)", lambda m: rf"\text{{ {'or' if m[1] or m[2] else 'and'} }}"),
        (r"(?<=[\d})])\s*([\u4e00-\u9fff]+)$", _chinese),
        (r"\s*(?:\\text\s*\{\s*)?\(\s*(?:\\text\s*\{\s*)?(?:(or|i\.e\.,?|that is,?|which is|=)|approx\w*\.?|about|\\approx)"
         r"(?: about| approximately)?(?![a-z])\s*\}?\s*([^()]*\d[^()]*?)\s*(?:\)|\\text\s*\{\s*\)\s*\})$",
         lambda m: rf" {'=' if m[1] else chr(92) + 'approx'} {m[2]}"),
        (rf"^\s*[a-z]\s*{_REAL}\s*,", ""),
        (r"^[a-z]\s*\\in\s*(?=\\\{|[\[(]|\\mathbb\s*\{[RZN]\}$)", ""),
        (rf"\s*{_OPEN}(?:which )?(?:(?:is|are) )?(less|smaller|greater|more) than"
         rf"( or equal to)?{_CLOSE}\s*(?=[-\d\\.])",
         lambda m: ( f"{'<' if m[1] in ('less', 'smaller') else '>'} " if not m[2] else rf"\{m[1][0].replace('s', 'l').replace('m', 'g')}eq " )),
        (rf"^{_OPEN}(?:all|any|every) (?:real )?(?:numbers?|values?)(?: of)? ?([a-z])?{_CLOSE}\s*(?=[<>]|\\[lg]eq)",
         lambda m: m[1] or "x"),
        (rf"[,\s]\s*\(?\s*[a-zA-Z]\s*{_REAL}\s*\)?$|\s*[,(]\s*[nk]\s*(?:>|\\geq)\s*\d\s*\)?$"
         rf"|\s*,?\s*(?:{_OPEN}(?:for(?: all| any)?(?: real)?|where){_CLOSE}|\\forall)\s*[a-z]\s*(?:{_REAL}|(?:>|\\geq)\s*\d)?$"
         rf"|\s*,?\s*{_OPEN}(?:where|for)(?: (?:all|any|some))?{_CLOSE}\s*[kmn]\s*{_OPEN}is (?:an|any) integer{_CLOSE}$"
         rf"|\s*,?\s*{_OPEN}(?:where|for)(?: (?:all|any|some))? integers?{_CLOSE}\s*[kmn]$", ""),
        # --- numbers
        (r"^([^*]*[\w)}])\s*\*\*\s*(-?\d+|[a-zA-Z])(?!.*\*\*)", r"\1^{\2}"),
        (r"(?<=\d)\s*(?:x|\*|\\ast|\\cdot|\\times)\s*10\s*(?:\^|\*\*)\s*\{?\s*(-?\d{1,4})\s*\}?",
         r" \\times 10^{\1}"),
        (r"^([-+]?\d+\.?\d*)[eE]\{?([-+]?\d{1,4})\}?(?=\s|$)", r"\1 \\times 10^{\2}"),
        (rf"^(\d{{1,9}})\s*{_OPEN}(?:in|over|out of){_CLOSE}\s*(\d{{1,9}})$", r"\\frac{\1}{\2}"),
        (r"^(?:\{\})?\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?$", r"\\frac{\1}{\2}"),
        # 21st, 3^{\text{rd}}
        (rf"^(\d{{1,9}})\s*\^?\s*\{{?\s*{_OPEN}(?:st|nd|rd|th)\s*\}}{{0,2}}$", r"\1"),
        (r"^\d{1,3}(?:\.\d{3}){2,}$|^\d{1,3}(?:_\d{3})+$", lambda m: re.sub("[._]", "", m[0])),
        (r"\^\{(-?\d*)\.(\d)\}", lambda m: _power(m)),
        (r"(?<!\d)(\d{0,9})\.(\d{0,9}?)(?:(\d)\3{2,20}|(\d{2,9}?)\4{1,9})"
         r"\s*(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.|…)", lambda m: rf"{m[1]}.{m[2]}\overline{{{m[3] or m[4]}}}"),
        (r"(?<!\d)(\d{0,9})\.(\d{0,9})\((\d{1,9})\)", r"\1.\2\\overline{\3}"),
        (r"\\dot\s*\{(\d)\}(\d{0,7})\\dot\s*\{(\d)\}", r"\\overline{\1\2\3}"),
        (r"\\(?:overline|bar|dot)\s*(\d)", r"\\overline{\1}"),
        (r"(?<!\d)(\d*)\.(\d{0,9})\\(?:overline|bar|dot)\s*\{(\d{1,9})\}", _repeating),
        (r"(?<![\d.,])(\d{1,3}(?:[ ']\d{3})+)(?:,(\d{1,2}$))?(?![\d/'])",
         lambda m: re.sub("[ ']", "", m[1]) + (f".{m[2]}" if m[2] else "")),
        (r"(?<![\d./^_{])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d./])", _mixed),
        # --- numerals with a base, choices and orders of n things
        (r"^\(?(?:0b)?[01]{1,4}(?:[ _][01]{4})+(?!\d)", lambda m: re.sub("[ _]", "", m[0])),
        (rf"^\(?([0-9A-F]+)\)?_\s*\{{?\s*{_OPEN}\(?(?:base\s*{_CLOSE}\s*)?([a-z]+|\d{{1,2}})\)?\}}{{0,2}}$"
         rf"|^([0-9A-F]+)\s*{_OPEN}\(?(?:in )?base[ -]?{_CLOSE}\s*([a-z]+|\d{{1,2}})\)?{_CLOSE}$", _base),
        (r"^0([bxo])([0-9A-Fa-f]+)$", lambda m: f"{m[2].upper()}_{{{ {'b': 2, 'o': 8, 'x': 16}[m[1]] }}}"),
        (r"(?<![a-zA-Z\\])([CP])\s*\((\d{1,4}|[a-z])\s*,\s*(\d{1,4}|[a-z])\)"
         r"|^(?:\{\})?[_^]?\{?(\d{1,4})\}?\s*([CP])\s*_?\{?(\d{1,4})\}?(?=\s*=|$)"
         r"|^([CP])_\{?(\d{1,4}|[a-z])\}?\^\{?(\d{1,4}|[a-z])\}?(?=\s*=|$)", _ways),
        # --- units and times
        (r"^(\d+)\s*'\s*(\d+(?:\.\d+)?)\s*\"$", r"\1 ft \2 in"),
        (rf"^(\d+)\s*{_OPEN}hr?s?{_CLOSE}\s*(\d+)\s*{_OPEN}m{_CLOSE}$", r"\1 h \2 min"),
        (r"^(\d{1,2})h([0-5]\d)$", r"\1:\2"),
        (rf"^(\d{{1,2}}:\d\d)\s*{_OPEN}h(?:ou)?r?s?{_CLOSE}$", r"\1"),
        (rf"^(\d{{1,2}}[:.]\d\d|[a-z0-9' -]+?)\s*{_OPEN}(?:in the (morning|afternoon|evening)|at night){_CLOSE}$",
         lambda m: f"{m[1]} {'A' if m[2] == 'morning' else 'P'}M"),
        (r"^(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(\d+(?:\.\d+)?)\s*'(?:\s*(\d+(?:\.\d+)?)\s*\")?$",
         lambda m: f"{m[1]} degrees {m[2]} arcminutes" + (f" {m[3]} arcseconds" if m[3] else "")),
        (rf"(?:(\d{{1,2}})[:.](\d\d)|^(\d{{1,2}}))\s*{_OPEN}([AaPp])\.?\s?[Mm]\.?{_CLOSE}(?![a-zA-Z])",
         lambda m: f"{m[1] or m[3]}:{m[2] or '00'} {m[4].upper()}M"),
        (r"(?<=\d)\s*\\Omega$", r"\\text{ ohm}"),
        (rf"(?<=\d)\s*(?:\\text\s*\{{\s*\}}\s*)?\\mu\s*{_OPEN}([a-zA-Z]){_CLOSE}$", r"\\text{ u\1}"),
        # --- congruences
        (rf"\s*(?:\(\s*{_OPEN}(?:\\?mod){_CLOSE}\s*(\w+)\s*\)|\\pmod\s*(?:(\w)|\{{\s*(\w+)\s*\}}))$",
         lambda m: rf" \pmod{{{m[1] or m[2] or m[3]}}}"),
        # --- sets, systems and several parts
        (r"^\\mathbb\{R\}\^\{?\*\}?$|^(?:\\text\{)?all non-?zero (?:real numbers|reals)\}?$",
         r"\\mathbb{R} \\setminus \\{0\\}"),
        (r"^\((-?[\d.]+)\s*\|\s*(-?[\d.]+)\)$", r"(\1, \2)"),
        (r"([][(])([^][();,]{1,40});([^][();,]{1,40})([][)])", r"\1\2,\3\4"),
        (r"^(?=\]|.*\[$).*,.*$", lambda m: half_open_as_in_english(m[0])),
        (r"^\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\s*\{R\})?\s*(?::|\\mid|\|)(.*(?:[<>]|\\[lgn]eq|\1\s*\\in).*)\\\}$",
         r"\2"),
        (r"(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)", r" \\setminus "),
        (rf"(?<=[\])])\s*{_OPEN}except(?: for| at)?{_CLOSE}\s*(-?[\w/.]+)$", r" \\setminus \\{\1\\}"),
        (rf"^{_OPEN}all (?:real numbers|reals) except(?: for)?{_CLOSE}\s*(?:[a-z]\s*=\s*)?(-?[\w\\{{}}/.]+)$",
         r"\\mathbb{R} \\setminus \\{\1\\}"),
        (r"^[(\[]([^][()]*,[^][()]*)[)\]]\s*\^\s*\{?\s*(?:T|\\top)\s*\}?$", _column),
        (rf"^(?:[^ijk]*{_UNIT_VECTOR}\s*(?=[-+]|$)){{2,3}}$", _vector),
        (r"^[a-z]\([a-z]\)\s*=\s*(?=\\begin\{cases\})", ""),
        (r"^\\begin\{(cases|aligned|gathered)\}(.*)\\end\{\1\}$", _system),
        (r"^(?!.*\\begin)[^=]*=.*\\\\.*=.*$", lambda m: m[0].replace(r"\\", ", ")),
        (rf"^{_OPEN}\(?(?:a|i)\).*$", _parts),
        (r"^([^=<>]*\d[^=<>]*)=([^=<>]+)$", _turned),
    )
]
# fmt: on


def _power(match: re.Match[str]) -> str:
    digits = int(f"{match[1].lstrip('-') or 0}{match[2]}")
    sign = "-" if match[1].startswith("-") else ""
    return rf"^{{{sign}\frac{{{digits}}}{{10}}}}"


@lru_cache(maxsize=16_384)
def latex(text: str) -> str:
    """The text in plain LaTeX; one that is too long to be an answer as it is."""
    if len(text) > MAX_CHARS:
        return text
    text = _ENTITY.sub(lambda m: html.unescape(m[0]), text.strip())
    if _DOUBLED.search(text) and not any(len(run) % 2 for run in _BACKSLASHES.findall(text)):
        text = text.replace("\\\\", "\\")
    text = _DOLLARS.sub(r"\1 \\text{ dollars}", text)
    text = "".join(map(_character, plain_form(text)))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    whole = WRAPPED.fullmatch(text)
    text = in_digits(as_time((whole[1] if whole else text).strip().strip('"').strip()))
    words = " ".join(WRAPPED.sub(r"\1", text).split())
    text = as_date(text if as_date(words) == words else words)
    for phrase, meaning in _PHRASES:
        if phrase.fullmatch(words):
            return meaning
    return text


_DOUBLED, _BACKSLASHES = re.compile(r"\\\\[a-zA-Z]{2}"), re.compile(r"\\+")  # as in JSON
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{1,6});")
_DOLLARS = re.compile(r"^\\?\$\s*(\d[\d,]*(?:\.\d+)?)$")

_SOLUTIONS = r"(?:(?:real|integer|rational|such|valid) )*(?:solutions?|roots?|values?|numbers?)"
_PHRASES = [
    (re.compile(phrase + r"\.?", re.IGNORECASE), meaning)
    for phrase, meaning in (
        ("(?:all|any|every) reals?(?: numbers?| values?(?: of [a-z])?| [a-z])?", r"\mathbb{R}"),
        (
            rf"无解|(?:the )?empty set|none|(?:there (?:is|are) )?no {_SOLUTIONS}(?: exists?)?",
            r"\emptyset",
        ),
        (
            rf"(?:(?:it )?diverges to )?infinity|infinite|infinitely many(?: {_SOLUTIONS})?|an infinite number(?: of {_SOLUTIONS})?",
            r"\infty",
        ),
        (r"dne|undefined|\\nexists|(?:(?:it|(?:the )?[a-z]+) )?does not exist", "does not exist"),
        ("(?:12 )?noon", "12:00 PM"),
        ("(?:12 )?midnight", "12:00 AM"),
    )
]
