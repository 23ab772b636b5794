r"""What an answer says before any mathematics: its text without typesetting, and plain numbers.

Pure standard library: most answers are settled here, without math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from exgrpo_fast.rewards.verifiers import extraction

WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|mbox|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|underline|emph|bold|pmb"
    r"|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_DROPPED = re.compile(r"(?<!\\)\\!|\\left(?![a-z])|\\right(?![a-z])|\\?\$|(?<!\\)\\$")
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=\d)\\,(?=\d{3})")
_SPACES = re.compile(r"(?:\s|~|(?<!\\)\\[ ,;:]|\\q?quad(?![a-zA-Z]))+")


@lru_cache(maxsize=16_384)
def plain_form(text: str) -> str:
    r"""The text without what is mere typesetting: `$`, `\left`, `\!`, `\dfrac`, outer `\text`.

    Two answers with the same plain form say the same thing.
    """
    text = _THIN_SPACE_IN_NUMBER.sub("", extraction.clean(text))
    text = _DROPPED.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _SPACES.sub(" ", text).strip()
    if text.endswith((".", ",", ";")) and not text.endswith("..."):
        text = text[:-1].rstrip()
    whole = WRAPPED.fullmatch(text)
    return whole[1].strip() if whole else text


_NUMBER = re.compile(
    r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)"  # 1,234.5
    r"(?:[eE]([-+]?\d{1,4})|\s*(?:\\times|\\cdot)\s*10\^(?:\{\s*([-+]?\d{1,4})\s*\}|(\d)))?"
)
_POWER_OF_TEN = re.compile(r"10\^(?:\{\s*([-+]?\d{1,4})\s*\}|(\d))")
_MAX_NUMBER_CHARS = 59  # longer ones are refused


def number(text: str) -> Fraction | None:
    r"""The exact value of a plain numeral: `42`, `-1,234.50`, `\$18`, `4.5e33`, `3 \times 10^{-8}`.

    None for everything else. Integers below 10^59, exponents of at most four digits.
    """
    text = plain_form(text)
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if power := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int(power[1] or power[2])
    match = _NUMBER.fullmatch(text)
    if match is None or not any(c.isdigit() for c in match[1]):
        return None
    mantissa = match[1].replace(",", "").rstrip(".")
    exponent = int(match[2] or match[3] or match[4] or 0)
    return Fraction(mantissa) * Fraction(10) ** exponent
