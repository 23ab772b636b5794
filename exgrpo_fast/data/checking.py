"""Are the fields, the answers and the ids of the rows right? Needs no tokenizer."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from exgrpo_fast.core.answers import answer_text, gold_answer, last_box, last_tag
from exgrpo_fast.data.parsing import Fault, kind, printable
from exgrpo_fast.data.sources import BadRow, DataError, Row, Source, read_rows, source_name

FIRST_ROWS = 100  # a field that none of these has is a mistake in the config, not in the rows
# Where data sets keep questions and answers; the first that the rows have is taken.
PROMPT_FIELDS = ("prompt", "problem", "question", "messages")
ANSWER_FIELDS = ("answer", "reward_model.ground_truth", "ground_truth", "solution")


@dataclass(frozen=True)
class CheckedRow:
    """A row whose fields are right; `prompt` is text or a list of chat messages.

    `columns` has the answer, too, where it is no text: rewards get it as the row has it.
    """

    where: str
    id: str
    prompt: str | list[dict[str, Any]]
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found: `rows` are usable, `bad_rows` are in the order of the file."""

    name: str
    rows: list[CheckedRow]
    bad_rows: list[BadRow]
    notes: list[str]  # what was chosen, merged or left out, for people
    num_repeated: int = 0
    is_whole: bool = True  # False: of the first rows alone

    @property
    def num_good(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.bad_rows) + self.num_repeated


class FieldNames(TypedDict, total=False):
    """Which fields of the rows are read; None for prompt and answer: the first of PROMPT_FIELDS or
    ANSWER_FIELDS that is there. A field may be nested: `reward_model.ground_truth`."""

    prompt_field: str | None
    answer_field: str | None
    id_field: str | None


_OF_A_TASK: FieldNames = {"prompt_field": "prompt", "answer_field": "answer", "id_field": None}


def check_data(
    source: Source, limit: int | None = None, /, **names: Unpack[FieldNames]
) -> DataReport:
    """Read a source and check each row: the usable ones, and the others with file:line and reason.

    Repeated questions are merged. For a gym task the field names are the task's own. `limit`: of the
    first so many rows. DataError when the source cannot be read, has no rows, or has no such fields.
    """
    name = source_name(source)
    is_file = isinstance(source, str | Path)
    if not is_file:
        names = _OF_A_TASK
    rows = iter(read_rows(source))
    first = list(itertools.islice(rows, FIRST_ROWS if limit is None else limit))
    checker = _checker_of(name, first, names)
    is_whole = limit is None or next(rows, None) is None
    checked = [
        row if isinstance(row, BadRow) else checker.check(row)
        for row in itertools.chain(first, rows if limit is None else ())
    ]
    # `prompt` and `answer` go without saying.
    fields = {"prompt": checker.prompt_field, "answer": checker.answer_field}
    chosen = [
        f"{part}s from '{field}'"
        for part, field in fields.items()
        if field not in (names.get(f"{part}_field"), part)
    ]
    notes = [", ".join(chosen)] * bool(chosen) + checker.notes()
    return DataReport(
        name,
        [row for row in checked if isinstance(row, CheckedRow)],
        [row for row in checked if isinstance(row, BadRow)],
        [f"data {name}: {note}" for note in notes] if is_file else [],
        checker.num_repeated,
        is_whole,
    )


def check_first_rows(source: Source, **names: Unpack[FieldNames]) -> DataReport:
    """Of the first rows, of a gym task of its first alone. DataError as `check_data`, and where none
    of them is usable."""
    limit = FIRST_ROWS if isinstance(source, str | Path) else 1
    report = check_data(source, limit, **names)
    if not report.rows:
        raise none_usable(report.name, report.bad_rows)
    return report


def none_usable(name: str, bad: Sequence[BadRow]) -> DataError:
    return DataError(f"data {name}: none of the first {len(bad)} rows is usable: {bad[0]}")


# --- fields of the config -------------------------------------------------------------------------


def _checker_of(name: str, first: Sequence[Row | BadRow], names: FieldNames) -> _Checker:
    if not first:
        raise DataError(f"data {name}: no rows")
    fields = [row.fields for row in first if isinstance(row, Row)]
    prompt = _field(name, "prompt_field", names.get("prompt_field"), PROMPT_FIELDS, fields)
    answer = _field(name, "answer_field", names.get("answer_field"), ANSWER_FIELDS, fields)
    if (identity := names.get("id_field")) is not None:
        _field(name, "id_field", identity, (), fields)
    return _Checker(prompt, answer, identity)


def _field(
    name: str,
    key: str,
    wanted: str | None,
    usual: Sequence[str],
    first: Sequence[Mapping[str, Any]],
) -> str:
    """The field to read. One that no row has is a mistake in the config: a hint, never a guess."""
    candidates = usual if wanted is None else [wanted]
    for candidate in candidates:
        if not first or any(_lookup(row, candidate) is not _ABSENT for row in first):
            return candidate
    there = list(dict.fromkeys(n for row in first for n in _names(row)))
    near = [n for n in (*usual, *_OTHER_NAMES.get(key, ())) if n in there]
    near = near or difflib.get_close_matches(candidates[0], there, n=1)
    only = len(near) == 1  # of two likely ones neither is suggested
    hint = f"; did you mean data.{key} {near[0]}?" if only else f"; name one with data.{key}"
    fields_there = ", ".join(map(printable, there)) or "none"
    looked_for = ", ".join(f"'{candidate}'" for candidate in candidates)
    raise DataError(f"data {name}: no field {looked_for}; fields there: {fields_there}{hint}")


_OTHER_NAMES = {
    "prompt_field": ("query", "instruction", "input"),
    "answer_field": ("gold", "target", "final_answer", "label", "expected_answer"),
}


def _names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of all fields, nested ones with dots."""
    names: list[str] = []
    for key, value in row.items():
        if isinstance(value, dict) and value:
            names += _names(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


_ABSENT = object()


def _lookup(row: Mapping[str, Any], name: str) -> Any:
    """A field by its name or, where no field is called so, by its path: `extra_info.index`."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


# --- one row --------------------------------------------------------------------------------------


@dataclass
class _Checker:
    """Row -> CheckedRow, BadRow or, for a question that was there before, None."""

    prompt_field: str
    answer_field: str
    id_field: str | None
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> where first, its content
    prompts: set[str] = field(default_factory=set)
    num_repeated: int = 0
    num_contradicting: int = 0  # rows that ask a question again, with another answer
    num_continued: int = 0  # rows whose last message is the beginning of the completion
    num_stripped: int = 0  # rows whose last message was the answer

    def check(self, row: Row) -> CheckedRow | BadRow | None:
        try:
            prompt = _prompt(_value(row, self.prompt_field), self.prompt_field)
            is_gym = "reasoning_gym" in row.fields and "metadata" in row.fields
            given = _value(row, self.answer_field)
            full = "" if is_gym and given == "" else as_answer(given, self.answer_field)
            answer = full if is_gym else _gold(full)
            prompt = self._without_answer(prompt, answer)
            content = content_id(prompt, answer)
            identity = content if self.id_field is None else _id(row, self.id_field)
            if identity in self.seen and not is_gym:
                where, known = self.seen[identity]
                if known == content:
                    self.num_repeated += 1
                    return None
                line = where.rpartition(":")[2]
                raise Fault(f"another question than line {line}, id '{printable(identity)}'")
        except Fault as fault:
            return BadRow(row.where, str(fault))
        if identity in self.seen:  # a generator may draw the same question twice
            numbered = (f"{identity}-{n}" for n in itertools.count(2))
            identity = next(new for new in numbered if new not in self.seen)
        asked = content_id(prompt, "")
        self.num_contradicting += asked in self.prompts and not is_gym
        self.prompts.add(asked)
        self.seen[identity] = (row.where, content)
        # Every other field; the answer's, too, where a reward may ask for it by its own name.
        columns = {k: v for k, v in row.fields.items() if k not in (self.prompt_field, "answer")}
        if answer != full:
            columns.setdefault("solution", full)
        if not isinstance(given, str):
            columns["answer"] = given
        return CheckedRow(row.where, identity, prompt, answer, columns)

    def notes(self) -> list[str]:
        counted = [
            (self.num_repeated, "repeat a question: merged"),
            (self.num_contradicting, "ask a question again, with another answer: all kept"),
            (self.num_stripped, "end with the assistant's answer: left out of the prompt"),
            (self.num_continued, "end with a message of the assistant: completions continue it"),
        ]
        return [f"{count} rows {what}" for count, what in counted if count]

    def _without_answer(
        self, prompt: str | list[dict[str, Any]], answer: str
    ) -> str | list[dict[str, Any]]:
        """A last message of the assistant is continued, unless it gives the answer away."""
        if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
            return prompt
        if not _states(prompt[-1]["content"], answer):
            self.num_continued += 1
            return prompt
        if len(prompt) == 1:
            raise Fault(f"field '{self.prompt_field}': nothing but the assistant's answer")
        self.num_stripped += 1
        return prompt[:-1]


def content_id(prompt: str | Sequence[Mapping[str, Any]], answer: str) -> str:
    """An id that is the same in every run: 16 hex digits of a hash of the prompt and the answer."""
    import xxhash

    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(f"{text}\0{answer}".encode())


# --- one field ------------------------------------------------------------------------------------


def _value(row: Row, name: str) -> Any:
    value = _lookup(row.fields, name)
    if value is _ABSENT:
        raise Fault(f"missing field '{name}'")
    return value


def _id(row: Row, name: str) -> str:
    given = _value(row, name)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise Fault(f"field '{name}': {kind(given)} instead of an id")
    return str(given)


def _prompt(value: Any, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, list):
        return _messages(value, name)
    if not isinstance(value, str):
        raise Fault(f"field '{name}': {kind(value)} instead of text or messages")
    if not value.strip():
        raise Fault(f"empty field '{name}'")
    return value


def _messages(value: list[Any], name: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise Fault(f"field '{name}': message {number} is {kind(message)}, not an object")
        message = {**message, "content": _content(message.get("content"), name, number)}
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise Fault(f"field '{name}': message {number} has no text '{key}'")
        messages.append(message)
    if not any(message["content"].strip() for message in messages):
        raise Fault(f"empty field '{name}'")
    return messages


def _content(content: Any, name: str, number: int) -> Any:
    """The parts of a message joined, `[{"type": "text", "text": ...}]`; else what was given."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        kind_of = part.get("type", "text") if isinstance(part, dict) else kind(part)
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Fault(f"field '{name}': message {number} has a part that is no text: {kind_of}")
    return "".join(part["text"] for part in content)


def as_answer(value: Any, name: str = "answer") -> str:
    """The text of an answer field, whatever its type. ValueError for null and for empty ones."""
    if value is None:
        raise Fault(f"field '{name}': null instead of an answer")
    text = answer_text(value).strip()
    if not text or value in ([], {}):
        raise Fault(f"empty field '{name}'")
    return text


def _gold(answer: str) -> str:
    gold = gold_answer(answer)
    if not gold:
        raise Fault("nothing after '####'" if "####" in answer else "nothing in the last box")
    return gold


def _states(text: str, answer: str) -> bool:
    """Whether a message of the assistant gives an answer, rather than beginning to look for one."""
    if last_box(text) is not None or "####" in text or last_tag(text) is not None:
        return True
    last_line = text.rstrip().rpartition("\n")[2]
    named = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", last_line)
    return named is not None and not last_line.endswith(":")
