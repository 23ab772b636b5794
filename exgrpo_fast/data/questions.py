"""Checked rows -> Questions: the chat template, the token ids, and how much may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.types import Question
from exgrpo_fast.data.checking import (
    CheckedRow,
    DataReport,
    FieldNames,
    check_data,
    content_id,
    none_usable,
)
from exgrpo_fast.data.sources import BadRow, DataError, Source

TOKENIZER_BATCH = 1024


@dataclass(frozen=True)
class LoadedQuestions:
    questions: list[Question]
    bad_rows: list[BadRow]
    num_overlong: int
    notes: list[str] = field(default_factory=list)  # of `DataReport`


def load_questions(
    source: Source,
    *,
    tokenizer: Any,
    system_prompt: str | None = None,
    max_prompt_tokens: int = 512,
    overlong_prompts: Literal["drop", "refuse"] = "drop",
    max_bad_rows: float = 0.001,
    limit: int | None = None,
    **names: Unpack[FieldNames],
) -> LoadedQuestions:
    """The questions of a source, tokenized, in the order of the source.

    tokenizer: one of transformers; its chat template is applied where it has one.
    max_bad_rows: the share of malformed rows that is skipped; with more, DataError.
    limit: only the first so many good questions; the other rows are checked all the same.
    DataError, in one line, also for a missing source, unknown fields, no question left, or a prompt
    above `max_prompt_tokens` where `overlong_prompts` is "refuse".
    """
    return make_questions(
        check_data(source, **names),
        tokenizer=tokenizer,
        system_prompt=system_prompt,
        max_prompt_tokens=max_prompt_tokens,
        overlong_prompts=overlong_prompts,
        max_bad_rows=max_bad_rows,
        limit=limit,
    )


def make_questions(
    report: DataReport,
    *,
    tokenizer: Any,
    system_prompt: str | None,
    max_prompt_tokens: int,
    overlong_prompts: Literal["drop", "refuse"],
    max_bad_rows: float,
    limit: int | None = None,
) -> LoadedQuestions:
    """As `load_questions`, of rows that were read already. Of the first rows alone the questions may be
    none; DataError where the chat template refuses all of them."""
    render = _Renderer(tokenizer, system_prompt)
    questions: list[Question] = []
    bad_rows = list(report.bad_rows)
    num_overlong = 0
    wanted = len(report.rows) if limit is None else max(limit, 0)
    batch_size = min(TOKENIZER_BATCH, max(wanted, 64))
    for start in range(0, len(report.rows), batch_size):
        batch = report.rows[start : start + batch_size]
        for row, made in zip(batch, render(batch), strict=True):
            if isinstance(made, BadRow):
                bad_rows.append(made)
            elif len(made.prompt_ids) <= max_prompt_tokens:
                questions.append(made)
            elif overlong_prompts == "refuse":
                raise DataError(
                    f"{row.where}: the prompt has {len(made.prompt_ids)} tokens, above "
                    f"data.max_prompt_tokens {max_prompt_tokens} (data.overlong_prompts drop leaves "
                    f"such rows out)"
                )
            else:
                num_overlong += 1
        if len(questions) >= wanted:
            break
    if bad_rows and not questions and not num_overlong:
        raise none_usable(report.name, bad_rows)
    if not report.is_whole:
        return LoadedQuestions(questions[:wanted], bad_rows, num_overlong, report.notes)
    if len(bad_rows) > max_bad_rows * report.num_rows:
        raise DataError(
            f"data {report.name}: {len(bad_rows)} of {report.num_rows} rows are malformed, "
            f"data.max_bad_rows allows {max_bad_rows:g} of them; the first: {bad_rows[0]}"
        )
    if not questions[:wanted]:
        raise DataError(
            f"data {report.name}: no usable question in {report.num_rows} rows: {len(bad_rows)} "
            f"malformed, {num_overlong} longer than data.max_prompt_tokens {max_prompt_tokens}"
        )
    return LoadedQuestions(questions[:wanted], bad_rows, num_overlong, report.notes)


def question_from_text(
    prompt: str, *, tokenizer: Any, system_prompt: str | None = None
) -> Question:
    """A question typed by hand; it has no answer to compare with."""
    row = CheckedRow("--prompt", content_id(prompt, ""), prompt, "")
    [made] = _Renderer(tokenizer, system_prompt)([row])
    if isinstance(made, BadRow):
        raise DataError(str(made))
    return made


# --- the chat template and the tokenizer ----------------------------------------------------------


class _Renderer:
    """Each row -> its Question, or a BadRow where the chat template refuses the messages."""

    def __init__(self, tokenizer: Any, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._system_prompt = system_prompt

    def __call__(self, rows: Sequence[CheckedRow]) -> list[Question | BadRow]:
        texts = self._texts(rows)
        encoded = iter(self._encode([text for text in texts if isinstance(text, str)]))
        return [
            text
            if isinstance(text, BadRow)
            else Question(
                row.id,
                tuple(next(encoded)),
                text,
                row.answer,
                row.columns,
                tuple(self._conversation(row)),
            )
            for row, text in zip(rows, texts, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # of which a tokenizer makes no empty list
            return []
        # A template writes its special tokens itself; a second <bos> would be one too many.
        return self._tokenizer(texts, add_special_tokens=not self._has_template)["input_ids"]

    def _texts(self, rows: Sequence[CheckedRow]) -> Sequence[str | BadRow]:
        if not self._has_template:
            return [self._plain_text(row) for row in rows]
        try:
            return self._apply_template(rows)
        except Exception:  # a template is a program; which row it refuses is found below
            return [self._one(row) for row in rows]

    def _one(self, row: CheckedRow) -> str | BadRow:
        try:
            return self._apply_template([row])[0]
        except Exception as error:
            return BadRow(row.where, f"the chat template refuses it: {first_line(error)}")

    def _apply_template(self, rows: Sequence[CheckedRow]) -> list[str]:
        rendered = self._tokenizer.apply_chat_template(
            [self._conversation(row) for row in rows], tokenize=False, add_generation_prompt=True
        )
        return [text + _beginning(row) for text, row in zip(rendered, rows, strict=True)]

    def _conversation(self, row: CheckedRow) -> list[dict[str, Any]]:
        messages = row.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if _beginning(row):
            messages = messages[:-1]
        if self._system_prompt and (not messages or messages[0]["role"] != "system"):
            return [{"role": "system", "content": self._system_prompt}, *messages]
        return messages

    def _plain_text(self, row: CheckedRow) -> str:
        if not isinstance(row.prompt, str):
            raise DataError(
                f"{row.where}: the prompt is a list of chat messages, and the tokenizer has no "
                "chat template"
            )
        return f"{self._system_prompt}\n\n{row.prompt}" if self._system_prompt else row.prompt


def _beginning(row: CheckedRow) -> str:
    """What the row has the assistant begin with; completions continue it.

    It stands behind the generation prompt as it is. (A template would close the message, and some
    leave out its thoughts.)
    """
    last = None if isinstance(row.prompt, str) else row.prompt[-1]
    return last["content"] if last is not None and last["role"] == "assistant" else ""
