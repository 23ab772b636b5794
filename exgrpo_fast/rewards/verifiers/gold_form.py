r"""An answer in the form in which its gold answer is written: `2 to 3` where that is `2:3`.

What is ambiguous alone, such as `12,5`, is clear beside a gold answer. Pure standard library.
"""

from __future__ import annotations

import re

from exgrpo_fast.rewards.verifiers.numerals import number


def in_form_of(gold: str, found: str) -> str:
    """`found`, or the same answer as `gold` would write it; both in `notation.latex`."""
    if found == gold or len(found) > MAX_CHARS or len(gold) > MAX_CHARS:
        return found
    if _DECIMAL.fullmatch(gold) and _WITH_COMMA.fullmatch(found) and number(found) is None:
        return found.replace(",", ".")
    if _RATIO.fullmatch(gold):
        found = _TO.sub(":", found)
        return _HALF_OF_DAY.sub("", found)
    if _TIME.fullmatch(gold) and (time := _AFTER_NOON.fullmatch(found)):
        return f"{int(time[1]) - 12}:{time[2]} PM"
    if _MODULUS.search(gold) is None:
        found = _MODULUS.sub("", found)
    if _CONSTANT.search(gold):
        found = _CONSTANT.sub("+C", found)
    if (column := _COLUMN.fullmatch(gold)) and (entries := _TUPLE.fullmatch(found)):
        return column[1] + entries[1].replace(",", r"\\") + column[3]
    if _TUPLE.fullmatch(gold) and (column := _COLUMN.fullmatch(found)):
        return f"({column[2].replace(chr(92) * 2, ',')})"
    return found


MAX_CHARS = 512

_DECIMAL = re.compile(r"-?\d+\.\d+")
_WITH_COMMA = re.compile(r"-?\d+,\d+")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_TO = re.compile(r"\s*(?:\\text\s*\{\s*to\s*\}|(?<=\d)\s+to(?=\s+\d))\s*")
_HALF_OF_DAY = re.compile(r"(?<=\d) [AP]M$")
_TIME = re.compile(r"\d{1,2}:\d\d [AP]M")
_AFTER_NOON = re.compile(r"(1[3-9]|2[0-3]):(\d\d)")
_MODULUS = re.compile(r"\s*\\pmod\s*(?:\d+|\{\s*\d+\s*\})\s*$")
_CONSTANT = re.compile(r"\+\s*[Cc]$")  # of integration
_COLUMN = re.compile(r"(\\begin\{[pb]matrix\})([^&]*)(\\end\{[pb]matrix\})")
_TUPLE = re.compile(r"\(([^()]*,[^()]*)\)")
