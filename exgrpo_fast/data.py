"""Rows of a dataset -> Questions. A malformed row is named and skipped, never a traceback.

Three stages, each usable alone:

    read_rows       source -> Row | BadRow, as the file has them (JSON Lines, JSON, Parquet, a
                    dataset of the Hugging Face hub, or a reasoning-gym task)
    check_data      + the fields, the answers and the ids; needs no tokenizer
    load_questions  + the chat template and the token ids

Whether a gold answer can be verified is not decided here: see `rewards.check_golds`.
"""

from __future__ import annotations

import ast
import datetime
import difflib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exgrpo_fast.errors import UserError

if TYPE_CHECKING:  # experience.py loads torch; check-data does without
    from exgrpo_fast.experience import Question

# A path, a hub dataset 'name[:split]' or 'name:config:split', or a gym task: a mapping or an object
# with gym, size, seed and options.
Source = str | Path | Mapping[str, Any] | Any

MAX_DEPTH = 64  # of nesting in a row; deeper ones break the JSON reader of the next process
FIRST_ROWS = 100  # a field that none of these has is a mistake in the config, not in the rows
TOKENIZER_BATCH = 1024


class DataError(UserError):
    """Data that cannot be used, as one line for the user."""


@dataclass(frozen=True)
class Row:
    where: str  # "file:line"
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    where: str  # "file:line"
    reason: str  # a few words

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


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


@dataclass(frozen=True)
class LoadedQuestions:
    questions: list[Question]
    bad_rows: list[BadRow]
    num_overlong: int


# --- one line of JSON -----------------------------------------------------------------------------


class _Fault(ValueError):
    """Why a row cannot be used, in a few words."""


def parse_row(line: bytes, *, last_without_newline: bool = False) -> dict[str, Any]:
    """One line of a JSON Lines file -> its object; ValueError with a few words when malformed."""
    if b"\0" in line:
        raise _Fault("NUL byte")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 (byte {error.start + 1})") from None
    value, end = _decode(text, 0)
    rest = text[end:].strip()
    if rest:
        raise _Fault("two objects on one line" if rest[0] in "{[" else "text after the object")
    return _as_object(value)


def _decode(text: str, start: int) -> tuple[Any, int]:
    """(value, where it ends); what JSON allows and a training run does not is refused."""
    faults: list[str] = []
    decoder = json.JSONDecoder(
        object_pairs_hook=lambda pairs: _object(pairs, faults),
        parse_int=lambda digits: _integer(digits, faults),
        parse_float=lambda digits: _float(digits, faults),
        parse_constant=lambda name: faults.append(f"{name} is not JSON"),
    )
    try:
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise _Fault("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Fault(_json_fault(error, text)) from None
    if faults:
        raise _BadValue(faults[0], end)
    return value, end


class _BadValue(_Fault):
    """A value that is refused although its end is known, so that reading can go on behind it."""

    def __init__(self, reason: str, end: int) -> None:
        super().__init__(reason)
        self.end = end


def _object(pairs: list[tuple[str, Any]], faults: list[str]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        faults.append(f"duplicate key '{_printable(twice)}'")
    return made


def _integer(digits: str, faults: list[str]) -> int:
    if len(digits) > 4300:  # where Python itself stops
        faults.append(f"integer of {len(digits.lstrip('-'))} digits")
        return 0
    return int(digits)


def _float(digits: str, faults: list[str]) -> float:
    value = float(digits)
    if math.isinf(value):
        faults.append("number out of range")
    return value


def _json_fault(error: json.JSONDecodeError, text: str) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
        return "truncated" if text else "empty"
    if text[error.pos] == "\ufeff":
        return "byte order mark inside the file"
    return f"{error.msg[0].lower()}{error.msg[1:]} at column {error.pos + 1}"


_JSON_NAMES = {type(None): "null", list: "a list", str: "a string", bool: "a boolean"}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", int: "a number", float: "a number"} | _JSON_NAMES
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(f"{_kind(value)} instead of an object")
    fault = _text_fault(value)
    if fault:
        raise _Fault(fault)
    return value


def _text_fault(value: Any) -> str | None:
    """What tokenizers, Parquet files and pipes choke on, anywhere in the row. Not recursive."""
    waiting = [("", value, 1)]
    while waiting:
        name, item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return "nested too deeply"
        if isinstance(item, str):
            fault = _string_fault(item)
            if fault:
                return f"{fault} in '{_printable(name)}'"
        elif isinstance(item, dict):
            waiting += [(str(key), key, depth + 1) for key in item]
            waiting += [(name or str(key), entry, depth + 1) for key, entry in item.items()]
        elif isinstance(item, list):
            waiting += [(name, entry, depth + 1) for entry in item]
    return None


def _string_fault(text: str) -> str | None:
    if "\0" in text:
        return "NUL character"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "lone surrogate"
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:40]


# --- files, datasets, tasks -----------------------------------------------------------------------


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """Every row of a source, in order; blank lines are no rows.

    DataError in one line when there is no such source or it cannot be read at all.
    """
    if not isinstance(source, str | Path):
        return _gym_rows(source)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        return _other_rows(source, path)
    if not path.is_file():
        raise DataError(_no_file(path))
    return _guarded(reader, path)


def _guarded(
    reader: Callable[[Path], Iterator[Row | BadRow]], path: Path
) -> Iterator[Row | BadRow]:
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror or error}") from None


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"data file {path}: is a folder"
    if not path.parent.is_dir():
        return f"data file {path}: no such file, and no folder {path.parent}"
    there = [file.name for file in path.parent.iterdir() if file.suffix.lower() in _READERS]
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.4)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    return f"data file {path}: no such file{hint}"


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _line_row(f"{path}:{number}", line)


def _line_row(where: str, line: bytes) -> Row | BadRow:
    try:
        return Row(where, parse_row(line))
    except _Fault as fault:
        return BadRow(where, str(fault))


def _json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, or JSON Lines under the name .json, which is at least as common."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path}: not UTF-8 (byte {error.start + 1})") from None
    yield from _list_rows(path, text)


def _list_rows(path: Path, text: str) -> Iterator[Row | BadRow]:
    line, counted = 1, 0  # `line` is right for the characters before `counted`
    at = _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, end = _decode(text, at)
            yield Row(where, _as_object(value))
        except _BadValue as fault:
            end = fault.end
            yield BadRow(where, str(fault))
        except _Fault as fault:
            if not _is_whole(text, at):  # where the next object begins is unknown
                raise DataError(f"{where}: {fault}") from None
            end = _decode(text, at)[1]
            yield BadRow(where, str(fault))
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"{where}: the list does not go on with ',' or ']' behind this object")


def _is_whole(text: str, at: int) -> bool:
    try:
        _decode(text, at)
    except _Fault:
        return False
    return True


def _skip(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Memory mapping would keep the file open for as long as a row lives.
        file = pyarrow.parquet.ParquetFile(path, memory_map=False)
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield _plain_row(f"{path}:{number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path}: {_first_line(error)}") from None


def _plain_row(where: str, row: Mapping[str, Any]) -> Row | BadRow:
    fields = {str(key): _plain(value) for key, value in row.items()}
    fault = _text_fault(fields)
    return BadRow(where, fault) if fault else Row(where, fields)


def _plain(value: Any) -> Any:
    """Columns travel as JSON: dates become text, missing numbers null, bytes are left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value) or isinstance(value, bytes):
        return None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
_FILE_SUFFIXES = {".csv", ".tsv", ".txt", ".yaml", ".yml", ".arrow", ".gz", ".zip", ".zst", ".xlsx"}


def _other_rows(source: str | Path, path: Path) -> Iterator[Row | BadRow]:
    if path.is_file() or path.suffix.lower() in _FILE_SUFFIXES:
        accepted = ", ".join(_READERS)
        raise DataError(f"data file {path}: unknown kind '{path.suffix}'; accepted: {accepted}")
    return _hub_rows(str(source))


def _hub_rows(source: str) -> Iterator[Row | BadRow]:
    name, *rest = source.split(":")
    if len(rest) > 2 or not name:
        raise DataError(
            f"data '{source}': expected a file, 'name', 'name:split' or 'name:config:split'"
        )
    config, split = (
        (None, *rest) if len(rest) == 1 else (rest[0], rest[1]) if rest else (None, "train")
    )
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data '{source}' is no file, and hub datasets need: pip install 'exgrpo-fast[train]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises types of four libraries
        raise DataError(
            f"data '{source}': no such file, and as a hub dataset: {_first_line(error)}"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield _plain_row(f"{source}:{number}", dict(row))


def _gym_rows(task: Any) -> Iterator[Row | BadRow]:
    """Questions of a reasoning-gym task, with what its scorer needs in another process."""
    name, options = _of(task, "gym"), dict(_of(task, "options") or {})
    if not isinstance(name, str):
        raise DataError(f"data: expected a file, a dataset's name or a gym task, got {task!r}")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"gym task '{name}' needs: pip install 'exgrpo-fast[gym]'") from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(f"unknown reasoning-gym task '{name}'{hint}")
    size, seed = _of(task, "size") or 500, _of(task, "seed") or 0
    try:
        items = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        for number, item in enumerate(items, start=1):
            yield Row(f"reasoning-gym {name}:{number}", _gym_fields(name, options, item))
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise DataError(f"reasoning-gym task '{name}': {_first_line(error)}") from None


def _gym_fields(name: str, options: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "prompt": item["question"],
        # None: the task accepts every valid answer and names none.
        "answer": "" if item["answer"] is None else str(item["answer"]),
        "reasoning_gym": name,
        "metadata": _literal(item.get("metadata")),
    }
    return fields | ({"gym_options": json.dumps(dict(options), default=str)} if options else {})


def _literal(metadata: Any) -> Any:
    """As a Python literal: JSON would make lists of tuples, and some scorers compare to tuples."""
    text = repr(metadata)
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):  # an object among the values
        return _plain(metadata)
    return text


def _of(task: Any, key: str) -> Any:
    return task.get(key) if isinstance(task, Mapping) else getattr(task, key, None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


# --- fields, answers, ids -------------------------------------------------------------------------


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
    name = _name(source)
    if not isinstance(source, str | Path):
        prompt_field, answer_field, id_field = "prompt", "answer", None
    rows = list(read_rows(source))
    if not rows:
        raise DataError(f"data {name}: no rows")
    first = list(itertools.islice((row.fields for row in rows if isinstance(row, Row)), FIRST_ROWS))
    for key, wanted in (("prompt_field", prompt_field), ("answer_field", answer_field)):
        _require_field(name, key, wanted, first)
    if id_field is not None:
        _require_field(name, "id_field", id_field, first)
    checker = _Checker(prompt_field, answer_field, id_field)
    checked = [row if isinstance(row, BadRow) else checker.check(row) for row in rows]
    return DataReport(
        name,
        [row for row in checked if isinstance(row, CheckedRow)],
        [row for row in checked if isinstance(row, BadRow)],
    )


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"reasoning-gym {_of(source, 'gym')}"


_USUAL_NAMES = {
    "prompt_field": ("prompt", "problem", "question", "query", "instruction", "input", "messages"),
    "answer_field": (
        "answer",
        "solution",
        "gold",
        "target",
        "final_answer",
        "ground_truth",
        "label",
    ),
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
    fields_there = ", ".join(map(_printable, there)) or "none"
    raise DataError(f"data {name}: no field '{wanted}'; fields there: {fields_there}{hint}")


@dataclass
class _Checker:
    """Row -> CheckedRow or BadRow; remembers the ids it has seen."""

    prompt_field: str
    answer_field: str
    id_field: str | None
    seen: dict[str, str] = field(default_factory=dict)  # id -> where it was first

    def check(self, row: Row) -> CheckedRow | BadRow:
        try:
            prompt = _prompt(self._field(row, self.prompt_field), self.prompt_field)
            is_gym = "reasoning_gym" in row.fields and "metadata" in row.fields
            given = self._field(row, self.answer_field)
            full = "" if is_gym and given == "" else as_answer(given, self.answer_field)
            answer = full if is_gym else _after_hashes(full)
            identity = self._id(row, prompt, answer, unique=not is_gym)
        except _Fault as fault:
            return BadRow(row.where, str(fault))
        self.seen[identity] = row.where
        columns = self._columns(row, full, answer)
        return CheckedRow(row.where, identity, prompt, answer, columns)

    def _field(self, row: Row, name: str) -> Any:
        if name not in row.fields:
            raise _Fault(f"missing field '{name}'")
        return row.fields[name]

    def _id(self, row: Row, prompt: Any, answer: str, *, unique: bool) -> str:
        if self.id_field is None:
            identity = content_id(prompt, answer)
        else:
            given = self._field(row, self.id_field)
            if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
                raise _Fault(f"field '{self.id_field}': {_kind(given)} instead of an id")
            identity = str(given)
        if identity not in self.seen:
            return identity
        if unique:
            line = self.seen[identity].rpartition(":")[2]
            of_id = "" if self.id_field is None else f" (id '{_printable(identity)}')"
            raise _Fault(f"duplicate of line {line}{of_id}")
        # A generator may draw the same question twice; that is no fault of a file.
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


def _prompt(value: Any, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, list):
        return _messages(value, name)
    if not isinstance(value, str):
        raise _Fault(f"field '{name}': {_kind(value)} instead of text or messages")
    if not value.strip():
        raise _Fault(f"empty field '{name}'")
    return value


def _messages(value: list[Any], name: str) -> list[dict[str, Any]]:
    if not value:
        raise _Fault(f"empty field '{name}'")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _Fault(f"field '{name}': message {number} is {_kind(message)}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _Fault(f"field '{name}': message {number} has no text '{key}'")
    if not any(message["content"].strip() for message in value):
        raise _Fault(f"empty field '{name}'")
    return value


def as_answer(value: Any, name: str = "answer") -> str:
    """The text of an answer field; numbers are written out. ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _Fault(f"field '{name}': {_kind(value)} instead of text or a number")
    text = str(value).strip()
    if not text:
        raise _Fault(f"empty field '{name}'")
    return text


def _after_hashes(answer: str) -> str:
    """GSM8K's answers are worked solutions that end in `#### 72`; the gold answer is the 72."""
    before, hashes, gold = answer.rpartition("####")
    if not hashes:
        return answer
    if not gold.strip():
        raise _Fault("nothing after '####'")
    return gold.strip()


# --- questions ------------------------------------------------------------------------------------


def load_questions(
    source: Source,
    *,
    tokenizer: Any,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    id_field: str | None = None,
    system_prompt: str | None = None,
    max_prompt_tokens: int = 512,
    overlong_prompts: Literal["drop", "refuse"] = "drop",
    max_bad_rows: float = 0.001,
    limit: int | None = None,
) -> LoadedQuestions:
    """The questions of a source, tokenized, in the order of the source.

    tokenizer: one of transformers; its chat template is applied where it has one.
    max_bad_rows: the share of malformed rows that is skipped; with more, DataError.
    limit: only the first so many good questions; the other rows are checked all the same.
    DataError, in one line, also for a missing source, unknown fields, no question left, or a prompt
    above `max_prompt_tokens` where `overlong_prompts` is "refuse".
    """
    report = check_data(
        source, prompt_field=prompt_field, answer_field=answer_field, id_field=id_field
    )
    render = _Renderer(tokenizer, system_prompt)
    questions: list[Question] = []
    unrendered: list[BadRow] = []
    num_overlong = 0
    batch_size = TOKENIZER_BATCH if limit is None else min(TOKENIZER_BATCH, max(limit, 64))
    for start in range(0, len(report.rows), batch_size):
        for made in render(report.rows[start : start + batch_size]):
            if isinstance(made, BadRow):
                unrendered.append(made)
                continue
            row, question = made
            if len(question.prompt_ids) > max_prompt_tokens:
                num_overlong += 1
                if overlong_prompts == "refuse":
                    raise DataError(_overlong(row, question, max_prompt_tokens))
            elif limit is None or len(questions) < limit:
                questions.append(question)
        if limit is not None and len(questions) >= limit:
            break
    bad_rows = report.bad_rows + unrendered
    _refuse_too_many(report, bad_rows, max_bad_rows)
    if not questions:
        raise DataError(
            f"data {report.name}: no usable question in {report.num_rows} rows: {len(bad_rows)} "
            f"malformed, {num_overlong} longer than data.max_prompt_tokens {max_prompt_tokens}"
        )
    return LoadedQuestions(questions, bad_rows, num_overlong)


def _overlong(row: CheckedRow, question: Question, limit: int) -> str:
    return (
        f"{row.where}: the prompt has {len(question.prompt_ids)} tokens, above "
        f"data.max_prompt_tokens {limit} (data.overlong_prompts drop leaves such rows out)"
    )


def _refuse_too_many(report: DataReport, bad_rows: Sequence[BadRow], max_bad_rows: float) -> None:
    if len(bad_rows) > max_bad_rows * report.num_rows:
        raise DataError(
            f"data {report.name}: {len(bad_rows)} of {report.num_rows} rows are malformed, "
            f"data.max_bad_rows allows {max_bad_rows:g} of them; the first: {bad_rows[0]}"
        )


class _Renderer:
    """Rows -> (row, Question), or a BadRow where the chat template refuses the messages."""

    def __init__(self, tokenizer: Any, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._system_prompt = system_prompt

    def __call__(
        self, rows: Sequence[CheckedRow]
    ) -> Iterable[tuple[CheckedRow, Question] | BadRow]:
        from exgrpo_fast.experience import Question

        texts = self._texts(rows)
        good = [(row, text) for row, text in zip(rows, texts, strict=True) if isinstance(text, str)]
        # A template writes its special tokens itself; a second <bos> would be one too many.
        encoded = (
            self._tokenizer([text for _, text in good], add_special_tokens=not self._has_template)[
                "input_ids"
            ]
            if good
            else []
        )
        ids = iter(encoded)
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, BadRow):
                yield text
            else:
                token_ids = tuple(next(ids))
                yield row, Question(row.id, token_ids, text, row.answer, row.columns)

    def _texts(self, rows: Sequence[CheckedRow]) -> list[str | BadRow]:
        if not self._has_template:
            return [self._plain_text(row) for row in rows]
        try:
            return self._apply_template([self._conversation(row) for row in rows])
        except Exception:  # a template is a program of its own; which row it refuses is found below
            return [self._one(row) for row in rows]

    def _one(self, row: CheckedRow) -> str | BadRow:
        try:
            return self._apply_template([self._conversation(row)])[0]
        except Exception as error:
            return BadRow(row.where, f"the chat template refuses it: {_first_line(error)}")

    def _apply_template(self, conversations: list[list[dict[str, Any]]]) -> Any:
        return self._tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )

    def _conversation(self, row: CheckedRow) -> list[dict[str, Any]]:
        messages = row.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self._system_prompt and messages[0]["role"] != "system":
            return [{"role": "system", "content": self._system_prompt}, *messages]
        return messages

    def _plain_text(self, row: CheckedRow) -> str:
        if not isinstance(row.prompt, str):
            raise DataError(
                f"{row.where}: the prompt is a list of chat messages, and the tokenizer has no "
                "chat template"
            )
        return f"{self._system_prompt}\n\n{row.prompt}" if self._system_prompt else row.prompt


def question_from_text(prompt: str, *, tokenizer: Any) -> Question:
    """A question typed by hand; it has no answer to compare with."""
    row = CheckedRow("--prompt", content_id(prompt, ""), prompt, "")
    made = next(iter(_Renderer(tokenizer, None)([row])))
    if isinstance(made, BadRow):
        raise DataError(str(made))
    return made[1]
