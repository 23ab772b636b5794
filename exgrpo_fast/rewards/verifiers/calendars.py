"""Dates and times of day in one form. Pure standard library."""

from __future__ import annotations

import re

_MONTHS = (
    "january february march april may june july august september october november december"
).split()
_AROUND = ("the", "of", "on", "st", "nd", "rd", "th")
_WORD = re.compile(r"[a-z]+|\d+")


def as_date(text: str) -> str:
    """`the 4th of July`, `15 March 2024` as `July 4`, `March 15, 2024`; any other text as it is."""
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


_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?: ([AP])M)?")


def time_in_form_of(gold: str, found: str) -> str:
    """`found` as the gold time is written where it says the same: `15:30` for `3:30 PM`.

    A time without AM or PM is one of a day of 24 hours, or, as a gold answer, of either half.
    """
    of_gold, of_found = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(found)
    if of_gold is None or of_found is None or not (of_gold[3] or of_found[3]):
        return found
    hours = [_hour(match) % (24 if of_gold[3] else 12) for match in (of_gold, of_found)]
    return gold if hours[0] == hours[1] and of_gold[2] == of_found[2] else found


def _hour(match: re.Match[str]) -> int:
    hour = int(match[1])
    return hour % 12 + 12 * (match[3] == "P") if match[3] else hour
