"""Are the fields, the answers and the ids of the rows right? Needs no tokenizer."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from exgrpo_fast.data.parsing import Fault, kind, printable
from exgrpo_fast.data.sources import BadRow, DataError, Row, Source, read_rows, source_name

FIRST_ROWS = 100  # a field that none of these has is a mistake in the config, not in the rows


@dataclass(frozen=True)
class CheckedRow:
    """A row whose fields are right; `prompt` is text or a list of chat messages."""

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

    @property
    def num_good(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.bad_rows)


def check_data(
    source: Source,
    *,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    id_field: str | None = None,
) -> DataReport:
    """Read a source and check each row: the usable ones, and the others with file:line and reason.

    For a gym task the field names are the task's own. DataError when the source cannot be read, has
    no rows, or has no such fields.
    """
    name = source_name(source)
    if not isinstance(source, str | Path):
        prompt_field, answer_field, id_field = "prompt", "answer", None
    rows = list(read_rows(source))
    if not rows:
        raise DataError(f"data {name}: no rows")
    first = list(itertools.islice((row.fields for row in rows if isinstance(row, Row)), FIRST_ROWS))
    _require_field(name, "prompt_field", prompt_field, first)
    _require_field(name, "answer_field", answer_field, first)
    if id_field is not None:
        _require_field(name, "id_field", id_field, first)
    checker = _Checker(prompt_field, answer_field, id_field)
    checked = [row if isinstance(row, BadRow) else checker.check(row) for row in rows]
    return DataReport(
        name,
        [row for row in checked if isinstance(row, CheckedRow)],
        [row for row in checked if isinstance(row, BadRow)],
    )


# --- fields of the config -------------------------------------------------------------------------

_USUAL_NAMES = {
    "prompt_field": "prompt problem question query instruction input messages".split(),
    "answer_field": "answer solution gold target final_answer ground_truth label".split(),
}


def _require_field(name: str, key: str, wanted: str, first: Sequence[Mapping[str, Any]]) -> None:
    """A field that no row has is a mistake in the config. It is suggested, never guessed."""
    if not first or any(wanted in row for row in first):
        return
    there = list(dict.fromkeys(field_name for row in first for field_name in row))
    usual = [field_name for field_name in _USUAL_NAMES.get(key, ()) if field_name in there]
    near = usual or difflib.get_close_matches(wanted, there, n=1)
    only = len(near) == 1  # of two likely ones neither is suggested
    hint = f"; did you mean data.{key} {near[0]}?" if only else f"; name one with data.{key}"
    fields_there = ", ".join(map(printable, there)) or "none"
    raise DataError(f"data {name}: no field '{wanted}'; fields there: {fields_there}{hint}")


# --- one row --------------------------------------------------------------------------------------


@dataclass
class _Checker:
    """Row -> CheckedRow or BadRow; remembers the ids it has seen."""

    prompt_field: str
    answer_field: str
    id_field: str | None
    seen: dict[str, str] = field(default_factory=dict)  # id -> where it was first

    def check(self, row: Row) -> CheckedRow | BadRow:
        try:
            prompt = _prompt(_value(row, self.prompt_field), self.prompt_field)
            is_gym = "reasoning_gym" in row.fields and "metadata" in row.fields
            given = _value(row, self.answer_field)
            full = "" if is_gym and given == "" else as_answer(given, self.answer_field)
            answer = full if is_gym else _after_hashes(full)
            identity = self._id(row, prompt, answer)
            if identity in self.seen:
                if not is_gym:
                    raise Fault(self._duplicate(identity))
                identity = self._numbered(identity)
        except Fault as fault:
            return BadRow(row.where, str(fault))
        self.seen[identity] = row.where
        columns = self._columns(row, full, answer)
        return CheckedRow(row.where, identity, prompt, answer, columns)

    def _id(self, row: Row, prompt: str | list[dict[str, Any]], answer: str) -> str:
        if self.id_field is None:
            return content_id(prompt, answer)
        given = _value(row, self.id_field)
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise Fault(f"field '{self.id_field}': {kind(given)} instead of an id")
        return str(given)

    def _duplicate(self, identity: str) -> str:
        line = self.seen[identity].rpartition(":")[2]
        of_id = "" if self.id_field is None else f" (id '{printable(identity)}')"
        return f"duplicate of line {line}{of_id}"

    def _numbered(self, identity: str) -> str:
        """A generator may draw the same question twice; that is no fault of a file."""
        return next(new for n in itertools.count(2) if (new := f"{identity}-{n}") not in self.seen)

    def _columns(self, row: Row, full: str, answer: str) -> dict[str, Any]:
        """Every other field; the answer's, too, where a reward may ask for it by its own name."""
        columns = {k: v for k, v in row.fields.items() if k not in (self.prompt_field, "answer")}
        if answer != full:
            columns.setdefault("solution", full)
        return columns


def content_id(prompt: str | Sequence[Mapping[str, Any]], answer: str) -> str:
    """An id that is the same in every run: 16 hex digits of a hash of the prompt and the answer."""
    import xxhash

    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(f"{text}\0{answer}".encode())


# --- one field ------------------------------------------------------------------------------------


def _value(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise Fault(f"missing field '{name}'")
    return row.fields[name]


def _prompt(value: Any, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, list):
        return _messages(value, name)
    if not isinstance(value, str):
        raise Fault(f"field '{name}': {kind(value)} instead of text or messages")
    if not value.strip():
        raise Fault(f"empty field '{name}'")
    return value


def _messages(value: list[Any], name: str) -> list[dict[str, Any]]:
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise Fault(f"field '{name}': message {number} is {kind(message)}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise Fault(f"field '{name}': message {number} has no text '{key}'")
    if not any(message["content"].strip() for message in value):
        raise Fault(f"empty field '{name}'")
    return value


def as_answer(value: Any, name: str = "answer") -> str:
    """The text of an answer field; numbers are written out. ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise Fault(f"field '{name}': {kind(value)} instead of text or a number")
    text = str(value).strip()
    if not text:
        raise Fault(f"empty field '{name}'")
    return text


def _after_hashes(answer: str) -> str:
    """GSM8K's answers are worked solutions that end in `#### 72`; the gold answer is the 72."""
    _, hashes, gold = answer.rpartition("####")
    if not hashes:
        return answer
    if not gold.strip():
        raise Fault("nothing after '####'")
    return gold.strip()
