r"""Answers in words: numbers (`twenty-one`, `three fourths`), dates, times of day, and equal texts.

Pure standard library.
"""

from __future__ import annotations

import re

# --- numbers --------------------------------------------------------------------------------------

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
_LARGE = {"dozen": 12, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_PARTS = dict(
    zip(
        "half third fourth fifth sixth seventh eighth ninth tenth".split(),
        range(2, 11),
        strict=True,
    ),
    quarter=4,
)
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
    second = next((place for place, word in enumerate(rest) if _number(rest[place:])[1]), 0)
    if second:  # `two hours and fifteen minutes`
        rest = [*rest[:second], *in_digits(" ".join(rest[second:])).split()]
    elif rest and (rest[0] in _LARGE or rest[0] == "hundred" or _number(rest)[1]):
        return text  # `seven eight` says two
    return " ".join([str(value), *rest])


def _number(words: list[str]) -> tuple[int, int]:
    """(value, words that say it); (0, 0) where the first word says none."""
    total = group = count = 0
    last = 1_000  # each word of a group is smaller than what the one before leaves open
    for place, word in enumerate(words):
        if word == "and" and count and words[place - 1] in ("hundred", *_LARGE):
            continue
        if word == "a" and not count and words[1:2] and words[1] in ("hundred", *_LARGE):
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


# --- dates and times of day -----------------------------------------------------------------------

_MONTHS = (
    "january february march april may june july august september october november december"
).split()
_ISO_DATE = re.compile(r"(\d{4})([-/])(\d\d)\2(\d\d)")
_AROUND = ("the", "of", "on", "st", "nd", "rd", "th")


def as_date(text: str) -> str:
    """`the 4th of July`, `15 March 2024` as `July 4`, `March 15, 2024`; any other text as it is."""
    if (iso := _ISO_DATE.fullmatch(text)) and 1 <= int(iso[3]) <= 12:
        return f"{_MONTHS[int(iso[3]) - 1].capitalize()} {int(iso[4])}, {iso[1]}"
    if len(text) > 60 or not (text[:1].isalnum() and any(c.isdigit() for c in text)):
        return text
    words = [word for word in _WORD.findall(text.lower()) if word not in _AROUND]
    months = [m for m in _MONTHS for word in words if len(word) > 2 and m.startswith(word)]
    numbers = [int(word) for word in words if word.isdecimal()]
    if len(months) != 1 or len(numbers) not in (1, 2) or len(words) != 1 + len(numbers):
        return text
    day, *year = numbers
    if not 1 <= day <= 31 or year and year[0] < 1000:
        return text
    return ", ".join([f"{months[0].capitalize()} {day}", *map(str, year)])


_SPOKEN = re.compile(
    r"(?:at )?(?:(?:a )?([a-z-]+|\d{1,2})(?: minutes?)? (past|to|after|before) )?([a-z]+|\d{1,2})"
    r"( o'clock)?(?: ([AP]M))?"
)


def as_time(text: str) -> str:
    """`quarter to eight`, `seven o'clock` as `7:45`, `7:00`; any other text as it is."""
    said = _SPOKEN.fullmatch(text)
    if said is None or not (said[2] or said[4]):
        return text
    if said[2] == "to" and said[1] != "quarter" and "minute" not in text:  # a ratio
        return text
    part = {"quarter": "15", "half": "30", None: "0"}.get(said[1]) or in_digits(said[1])
    hour = in_digits(said[3])
    if not (part.isdecimal() and hour.isdecimal() and int(part) < 60 and 1 <= int(hour) <= 12):
        return text
    minutes = (60 * int(hour) + int(part) * (-1 if said[2] in ("to", "before") else 1)) % 720
    return f"{minutes // 60 or 12}:{minutes % 60:02}" + (f" {said[5]}" if said[5] else "")


_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?: ([AP])M)?")


def time_in_form_of(gold: str, found: str) -> str:
    """`found` as the gold time is written where it says the same: `15:30` for `3:30 PM`.

    A time without AM or PM is one of a day of 24 hours, or, as a gold answer, of either half.
    """
    of_gold, of_found = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(found)
    if of_gold is None or of_found is None or not (of_gold[3] or of_found[3]):
        return found
    whole_day = of_gold[3] or int(of_gold[1]) % 24 > 12
    hours = [_hour(match) % (24 if whole_day else 12) for match in (of_gold, of_found)]
    return gold if hours[0] == hours[1] and of_gold[2] == of_found[2] else found


def _hour(match: re.Match[str]) -> int:
    hour = int(match[1])
    return hour % 12 + 12 * (match[3] == "P") if match[3] else hour


# --- texts ----------------------------------------------------------------------------------------

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|tt)?|mbox|math(?:rm|bf|tt))\s*\{([^{}\\]*)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}(?:[ -][A-Za-z]+)*|(?i:yes|no|true|false)")
_DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

_ARTICLE = re.compile(
    r"^(?:\(?[a-j][).:] ?\)?)?"  # of an option
    r"(?:(?:it|this|that|he|she|the(?: [a-z]+){1,3})(?: is| was| will be|,) |on |at )?"
    r"(?:the |an? )?(?:(?:colou?r|letter|month|day) )?"
)
_YES_OR_NO = re.compile(r"(yes|no)[.,;:!] ")
_TAKEN_BACK = {
    "yes": re.compile(r"\b(?:yes|no|not|but|or|maybe|perhaps)\b|n't\b"),
    "no": re.compile(r"\b(?:yes|but|or|maybe|perhaps)\b"),
}
_INITIALS = {"true": "t", "false": "f", "yes": "y", "no": "n"}


def same_text(found: str, gold: str) -> bool:
    """Whether two answers in one notation read the same, but for spaces and, in words, capitals."""
    # A run of spaces is one, so that none of it is left between two digits.
    found, gold = (" ".join(text.split()) for text in (found, gold))
    if _SPACE.sub("", found) == _SPACE.sub("", gold):
        return True
    found, gold = (" ".join(_TEXT.sub(r"\1", text).split()) for text in (found, gold))
    if _SPACE.sub("", found) == _SPACE.sub("", gold):
        return True
    found = found.rstrip(".!")
    if gold.casefold() in _parts_of_date(found.casefold()):
        return True
    if _WORDS.fullmatch(gold) is None:
        return False
    found, gold = (_ARTICLE.sub("", text.casefold()) for text in (found, gold))
    if gold in _TAKEN_BACK and (said := _YES_OR_NO.match(found)):
        return said[1] == gold and not _TAKEN_BACK[gold].search(found[said.end() :])
    if found == _INITIALS.get(gold) or gold in _DAYS and len(found) > 2 and gold.startswith(found):
        return True
    found, gold = _KIND.sub("", _HAS_THE.sub(r"\1", found)), _KIND.sub("", gold)
    return found.removesuffix("s") == gold.removesuffix("s")  # `no solutions`


_KIND = re.compile(r" (?:function|number|integer|triangle|angle|series|sequence)$")
_HAS_THE = re.compile(
    r"^(\w+) (?:has|had|is|was|will win|wins|won)(?: (?:the|an?)(?: (?!not\b|or\b|but\b)[a-z]+)+)?$"
)


def _parts_of_date(text: str) -> list[str]:
    """`friday, june 6`, `june 6, 2020` as what each of them says; [] for anything else."""
    first, _, rest = text.partition(", ")
    if first in _DAYS and (date := as_date(rest)) != rest:
        return [first, date.casefold()]
    return [first] if re.fullmatch(r"\d{4}", rest) and as_date(first) != first else []
