"""One piece of JSON -> the object of a row, or the reason why it cannot be used.

Stricter than the json module: what JSON does not allow, and what tokenizers, Parquet files and
pipes choke on later, is refused here in a few words.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MAX_DEPTH = 64  # of nesting in a row; deeper ones break the JSON reader of the next process
MAX_DIGITS = 4300  # of an integer, where Python itself stops


class Fault(ValueError):
    """Why a row cannot be used, in a few words."""


def parse_row(line: bytes) -> dict[str, Any]:
    """One line of a JSON Lines file -> its object; ValueError with a few words when malformed."""
    if b"\0" in line:
        raise Fault("NUL byte")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Fault(f"not UTF-8 (byte {error.start + 1})") from None
    value, end, faults = decode(text, 0)
    rest = text[end:].strip()
    if rest:
        faults.append("two objects on one line" if rest[0] in "{[" else "text after the object")
    return as_object(value, faults)


# --- the syntax -----------------------------------------------------------------------------------


def decode(text: str, start: int) -> tuple[Any, int, list[str]]:
    """(value, where it ends, faults in it); Fault where the text is no JSON, so that no end is."""
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
        raise Fault("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Fault(_syntax_fault(error, text)) from None
    return value, end, faults


def _object(pairs: list[tuple[str, Any]], faults: list[str]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        faults.append(f"duplicate key '{printable(twice)}'")
    return made


def _integer(digits: str, faults: list[str]) -> int:
    if len(digits) > MAX_DIGITS:
        faults.append(f"integer of {len(digits.lstrip('-'))} digits")
        return 0
    return int(digits)


def _float(digits: str, faults: list[str]) -> float:
    value = float(digits)
    if math.isinf(value):
        faults.append("number out of range")
    return value


def _syntax_fault(error: json.JSONDecodeError, text: str) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
        return "truncated" if text else "empty"
    if text[error.pos] == "\ufeff":
        return "byte order mark inside the file"
    return f"{error.msg[0].lower()}{error.msg[1:]} at column {error.pos + 1}"


# --- the value ------------------------------------------------------------------------------------


def as_object(value: Any, faults: list[str]) -> dict[str, Any]:
    """A decoded value as the fields of a row; Fault with the first thing that is wrong with it."""
    if faults:
        raise Fault(faults[0])
    if not isinstance(value, dict):
        raise Fault(f"{kind(value)} instead of an object")
    fault = text_fault(value)
    if fault:
        raise Fault(fault)
    return value


def text_fault(value: Any) -> str | None:
    """What tokenizers, Parquet files and pipes choke on, anywhere in the row. Not recursive."""
    waiting = [("", value, 1)]
    while waiting:
        name, item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return "nested too deeply"
        if isinstance(item, str):
            fault = _string_fault(item)
            if fault:
                return f"{fault} in '{printable(name)}'"
        elif isinstance(item, dict):
            waiting += [(str(key), key, depth + 1) for key in item]
            waiting += [(name or str(key), entry, depth + 1) for key, entry in item.items()]
        elif isinstance(item, list):
            waiting += [(name, entry, depth + 1) for entry in item]
    return None


def _string_fault(text: str) -> str | None:
    if "\0" in text:
        return "NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


# --- words for messages ---------------------------------------------------------------------------

_KINDS = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:40]
