r"""The reward `multiple_choice`: does a completion choose the gold letter, and no other?

A letter counts where a completion states its choice: in a `\boxed{}`, an `<answer>`, behind `####`,
and at the very end, as `Answer: C` or as a line with nothing but the letter. A letter in running
text never counts, nor does a list of options that the completion repeats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from exgrpo_fast.rewards.judgement import CORRECT, NO_ANSWER, WRONG, Judgement
from exgrpo_fast.rewards.verifiers import extraction
from exgrpo_fast.rewards.verifiers.numerals import plain_form


def multiple_choice(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[Judgement]:
    r"""1.0 where the completion chooses the gold letter, A to J.

    `\boxed{C}`, `\boxed{\textbf{(C)}\ 42}`, `Answer: C) Paris` at the end, `(C)` or `C.` as the last
    line. `no_answer` where no letter is chosen, or two different ones are.
    """
    return [
        _choice(text, extraction.gold_text(gold))
        for text, gold in zip(completions, answer, strict=True)
    ]


def _choice(completion: str, gold: str) -> Judgement:
    chosen = chosen_letters(extraction.visible_part(completion))
    if len(chosen) != 1:
        return NO_ANSWER
    return CORRECT if chosen == letters_in(gold) else WRONG


def _choice_gold(gold: str, columns: Mapping[str, Any]) -> Judgement:
    return CORRECT if len(letters_in(extraction.gold_text(gold))) == 1 else (0.0, "no_letter")


def chosen_letters(text: str) -> set[str]:
    """Every letter that the text states as its choice."""
    stated = [text[slice(*span)] for span in extraction.box_spans(text)[-MAX_BOXES:]]
    stated += [extraction.last_hashes(text) or "", extraction.last_tag(text) or ""]
    letters = {letter for statement in stated for letter in letters_in(statement)}
    return letters | _letters_at_the_end(text)


MAX_BOXES = 20  # nested boxes would cost the square of their number
MAX_CHARS = 500  # a longer statement is a text


def _letters_at_the_end(text: str) -> set[str]:
    letters: set[str] = set()
    lines = [line for line in text[-MAX_CHARS:].splitlines() if line.strip()]
    while lines and (alone := _ALONE.fullmatch(_plain(lines[-1]))):
        letters.add(alone[1].upper())
        lines.pop()
    last = _plain(lines[-1]) if lines else ""
    for mark in _MARK.finditer(last):
        letters |= letters_in(last[mark.end() :])
    return letters


# A choice may have its text behind it, as in `(C) Paris`, `C. Paris`; a list has several.
_ALONE = re.compile(r"\(?([A-Ja-j])[).:]{0,2}")
_OPTION = re.compile(r"(?:\(([A-J])\)|([A-J])(?:[).:]| (?=\d|\\frac)))(.*)", re.DOTALL)
_ANOTHER = re.compile(r"\(([A-J])\)|(?:\b(?:or|and)\b|[,;/&])\s*([A-J])\b")
_LIST = re.compile(r"\(?[A-J]\)?(?:\s*(?:\b(?:or|and)\b|[,;/&])\s*\(?[A-J]\)?)+[.]?")
_MARK = re.compile(
    r"\b(?:answer|choice|option)(?:\s+(?:is|choice|option))*\s*[:=]?\s*", re.IGNORECASE
)


def letters_in(statement: str) -> set[str]:
    """The letters that a statement of nothing but the answer names."""
    if len(statement) > MAX_CHARS:
        return set()
    text = _plain(statement)
    if alone := _ALONE.fullmatch(text):
        return {alone[1].upper()}
    if _LIST.fullmatch(text):
        return set(re.findall(r"\b[A-J]\b", text))
    option = _OPTION.match(text)
    if option is None:
        return set()
    others = {a or b for a, b in _ANOTHER.findall(option[3])}
    return {option[1] or option[2]} | others


_LETTER = re.compile(r"\(?([A-J])\)?")
_SAID_TO_BE_ONE = re.compile(r"(?:option|choice)\s+", re.IGNORECASE)


def chooses(found: str, gold: str) -> bool:
    """Whether the gold answer is a letter and `found` that option, with or without its text.

    Or several letters, in alphabetical order, and `found` the same ones.
    """
    letter = _LETTER.fullmatch(_plain(gold))
    if letter is None:
        return bool(several := _several(_plain(gold))) and several == _several(_plain(found))
    return letters_in(_SAID_TO_BE_ONE.sub("", _plain(found), count=1)) == {letter[1]}


_SEVERAL = re.compile(r"[({\\\\\s]*[A-J](?:[\s,;&()、]|\band\b|[A-J])*[A-J][)}\\\\\s]*")


def _several(text: str) -> str:
    """`B, D and E` as `BDE`; "" unless the letters are in order."""
    letters = re.findall("[A-J]", text) if _SEVERAL.fullmatch(text) else []
    return "".join(letters) if letters == sorted(set(letters)) else ""


_WRAPPED = re.compile(r"\\(?:text\w*|math\w*|mbox)\s*\{([^{}]*)\}")


def _plain(text: str) -> str:
    """Without bold, dollars and other typesetting."""
    text = _WRAPPED.sub(r"\1", plain_form(text[:MAX_CHARS]))
    return plain_form(re.sub(r"[*`$]", "", text)).strip()


multiple_choice.check_gold = _choice_gold  # pyright: ignore[reportFunctionMemberAccess]
