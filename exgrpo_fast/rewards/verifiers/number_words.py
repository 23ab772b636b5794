r"""Numbers in English words: `twenty-one` -> 21, `three fourths` -> 3/4, `seven apples` -> 7 apples.

Pure standard library.
"""

from __future__ import annotations

import re

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
_LARGE = {"dozen": 12, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6} | {
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_WORD = re.compile(r"[a-z]+|\d+")


def in_digits(text: str) -> str:
    """A text of words that begins with a number, with that number in digits; any other text as it is.

    Whether what follows is a unit (`seven apples`, `seven or more`) is for the caller to say.
    """
    words = _WORD.findall(text.lower())
    if not words or not re.fullmatch(r"(?:\d+ and|[A-Za-z]+)(?:[ -]+[A-Za-z]+)*\.?", text):
        return text
    value, count = (int(words[0]), 1) if words[0].isdecimal() else _number(words)
    if words[0] in ("minus", "negative") and len(words) > 1:
        rest = in_digits(text.split(None, 1)[1])
        return f"-{rest}" if rest[0] in "\\0123456789" else text
    if not count and words[0] in ("a", "an") and words[1:2] and words[1] in _PARTS:
        value, count = 1, 1  # `a third`
    if not count:
        return text
    rest = words[count:]
    if rest and (below := _PARTS.get(rest[0].removesuffix("s").replace("halve", "half"))):
        return " ".join([rf"\frac{{{value}}}{{{below}}}", *rest[1:]])
    if rest[:1] == ["and"] and (part := in_digits(" ".join(rest[1:]))).startswith(r"\frac"):
        return f"{value} and {part}"  # `seven and a half`
    if any(word in _SMALL or word in _LARGE or word == "hundred" for word in rest):
        return text  # `seven eight` says two
    return " ".join([str(value), *rest])


def _number(words: list[str]) -> tuple[int, int]:
    """(value, words that say it); (0, 0) where the first word says none."""
    total = group = count = 0
    last = 1_000  # each word of a group is smaller than what the one before leaves open
    for place, word in enumerate(words):
        if word == "and" and count and words[place - 1] in ("hundred", *_LARGE):
            continue
        if (
            word == "a"
            and not count
            and words[1:2] in (["hundred"], ["thousand"], ["million"], ["dozen"])
        ):
            group, last = 1, 1
        elif word in _SMALL and _SMALL[word] < last and not (last == 1 and count):
            group += _SMALL[word]
            last = 10 if _SMALL[word] >= 20 else 1
        elif word == "hundred" and 0 < group < 10:
            group, last = 100 * group, 100
        elif word in _LARGE and group:
            total, group, last = total + group * _LARGE[word], 0, 1_000
        else:
            break
        count = place + 1
    return total + group, count
