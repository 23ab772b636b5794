"""Where rows come from: files, datasets of the Hugging Face hub, and reasoning-gym tasks."""

from __future__ import annotations

import ast
import datetime
import difflib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line
from exgrpo_fast.data.parsing import Fault, as_object, decode, parse_row, text_fault

# A path, a hub dataset 'name[:split]' or 'name:config:split', or a gym task: a mapping or an object
# with gym, size, seed and options.
Source = str | Path | Mapping[str, Any] | Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


Rows = Iterator[Row | BadRow]


def read_rows(source: Source) -> Rows:
    """Every row of a source, in order; blank lines are no rows.

    DataError in one line when there is no such source or it cannot be read at all.
    """
    if not isinstance(source, str | Path):
        return _gym_rows(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in _READERS:
        if not path.is_file():
            raise DataError(_no_file(path))
        return _file_rows(path, _READERS[suffix])
    if names_file(path):
        accepted = ", ".join(_READERS)
        raise DataError(f"data file {path}: unknown kind '{path.suffix}'; accepted: {accepted}")
    return _hub_rows(str(source))


def names_file(source: str | Path) -> bool:
    """Whether it is a file or is called like one; else a dataset of the hub is meant."""
    path = Path(source)
    return path.is_file() or path.suffix.lower() in {*_READERS, *_OTHER_SUFFIXES}


def source_name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"reasoning-gym {_of(source, 'gym')}"


# --- files ----------------------------------------------------------------------------------------


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"data file {path}: is a folder"
    if not path.parent.is_dir():
        return f"data file {path}: no such file, and no folder {path.parent}"
    there = [file.name for file in path.parent.iterdir() if file.suffix.lower() in _READERS]
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.4)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    return f"data file {path}: no such file{hint}"


def _file_rows(path: Path, reader: Callable[[Path], Rows]) -> Rows:
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror or error}") from None


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield _row(f"{path}:{number}", parse_row, line)


def _row(where: str, parse: Callable[..., dict[str, Any]], *arguments: Any) -> Row | BadRow:
    try:
        return Row(where, parse(*arguments))
    except Fault as fault:
        return BadRow(where, str(fault))


def _json(path: Path) -> Rows:
    """A list of objects, or JSON Lines under the name .json, which is at least as common."""
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path}: not UTF-8 (byte {error.start + 1})") from None
    yield from _list_rows(path, text)


def _list_rows(path: Path, text: str) -> Rows:
    line, counted = 1, 0  # `line` is right for the characters before `counted`
    at = _skip_spaces(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, end, faults = decode(text, at)
        except Fault as fault:  # where the next object begins is unknown
            raise DataError(f"{where}: {fault}") from None
        yield _row(where, as_object, value, faults)
        at = _skip_spaces(text, end)
        if text[at : at + 1] == ",":
            at = _skip_spaces(text, at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"{where}: the list does not go on with ',' or ']' behind this object")


def _skip_spaces(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A row a time; DataError for what is no parquet file, OSError where it cannot be read."""
    import pyarrow.parquet

    try:
        # Memory mapping would keep the file open for as long as a row lives.
        file = pyarrow.parquet.ParquetFile(path, memory_map=False)
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path}: {first_line(error)}") from None


def _parquet(path: Path) -> Rows:
    return _plain_rows(str(path), parquet_rows(path))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
# Names that end so are meant as files, never as datasets of the hub.
_OTHER_SUFFIXES = {
    ".csv", ".tsv", ".txt", ".yaml", ".yml", ".arrow", ".gz", ".zip", ".zst", ".xlsx",
}  # fmt: skip


# --- rows of a table ------------------------------------------------------------------------------


def _plain_rows(source: str, rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows, start=1):
        where, fields = f"{source}:{number}", _plain(dict(row))
        fault = text_fault(fields)
        yield BadRow(where, fault) if fault else Row(where, fields)


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


# --- datasets of the hub --------------------------------------------------------------------------


def _hub_rows(source: str) -> Rows:
    name, *rest = source.split(":")
    if len(rest) > 2 or not name:
        raise DataError(
            f"data '{source}': expected a file, 'name', 'name:split' or 'name:config:split'"
        )
    split = rest.pop() if rest else "train"
    config = rest.pop() if rest else None
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data '{source}' is no file, and hub datasets need: pip install 'exgrpo-fast[train]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises types of four libraries
        raise DataError(
            f"data '{source}': no such file, and as a hub dataset: {first_line(error)}"
        ) from None
    yield from _plain_rows(source, rows)


# --- tasks of reasoning-gym -----------------------------------------------------------------------


def _gym_rows(task: Any) -> Rows:
    """Questions of a reasoning-gym task, with what its scorer needs in another process."""
    name, options = _of(task, "gym"), dict(_of(task, "options") or {})
    if not isinstance(name, str):
        raise DataError(f"data: expected a file, a dataset's name or a gym task, got {task!r}")
    size, seed = _of(task, "size") or 500, _of(task, "seed") or 0
    for number, item in enumerate(gym_items(name, size, seed, options), start=1):
        yield Row(f"reasoning-gym {name}:{number}", _gym_fields(name, options, item))


def gym_items(
    name: str, size: int, seed: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """question, answer and metadata of each, as reasoning-gym makes them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of packages that it loads
            import reasoning_gym.factory
    except ImportError:
        raise DataError(f"gym task '{name}' needs: pip install 'exgrpo-fast[gym]'") from None
    tasks = reasoning_gym.factory.DATASETS
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(f"unknown reasoning-gym task '{name}'{hint}")
    try:
        yield from reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise DataError(f"reasoning-gym task '{name}': {first_line(error)}") from None


def _of(task: Any, key: str) -> Any:
    return task.get(key) if isinstance(task, Mapping) else getattr(task, key, None)


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
