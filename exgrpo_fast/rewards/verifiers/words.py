r"""Whether two answers read the same: `\text{an ellipse}`, `Ellipse.`. Pure standard library."""

from __future__ import annotations

import re

_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}\\]*)\}")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}(?:[ -][A-Za-z]+)*|[Nn]o")

_ARTICLE = re.compile(r"^(?:(?:it|this|that|he|she) is |on |at )?(?:the |an? )?")
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
    found, gold = (_TEXT.sub(r"\1", text) for text in (found, gold))
    if _SPACE.sub("", found) == _SPACE.sub("", gold):
        return True
    found = found.rstrip(".")
    if _WORDS.fullmatch(gold) is None:
        return False
    found, gold = (_ARTICLE.sub("", text.casefold()) for text in (found, gold))
    if gold in _TAKEN_BACK and (said := _YES_OR_NO.match(found)):
        return said[1] == gold and not _TAKEN_BACK[gold].search(found[said.end() :])
    if found == _INITIALS.get(gold):
        return True
    return found.removesuffix("s") == gold.removesuffix("s")  # `no solutions`
