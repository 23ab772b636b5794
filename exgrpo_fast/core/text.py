"""Text from anywhere, made safe for a terminal, a log and a file."""

from __future__ import annotations

import re

MAX_LINE = 16_384  # characters; longer lines make terminals and log viewers crawl

# C0 and C1 control characters but tab and newline, the Unicode line separators, the marks that
# reorder text on screen ("Trojan source"), and lone surrogates, which no UTF-8 file can hold.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SECRET = re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{16,}")


def clean_text(text: object, *, max_line: int = MAX_LINE) -> str:
    """Text from anywhere -> text that is safe in a terminal, a log and a UTF-8 file.

    Tabs and newlines stay; other control characters become visible escapes, access tokens are
    hidden, and a line longer than `max_line` is cut with a note of how much is gone.
    """
    safe = _safe(text)
    if len(safe) <= max_line:
        return safe
    return "\n".join(_cut(line, max_line) for line in safe.split("\n"))


def clean_line(text: object, *, max_line: int = MAX_LINE) -> str:
    """The same as one line: newlines and tabs become visible escapes too."""
    return _cut(_safe(text).replace("\n", "\\n").replace("\t", "\\t"), max_line)


def _safe(text: object) -> str:
    return _SECRET.sub(r"\1[hidden]", _UNSAFE.sub(_escape, str(text)))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    named = {0x0D: "\\r", 0x1B: "\\e", 0x00: "\\0"}
    return named.get(code) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _cut(line: str, limit: int) -> str:
    if len(line) <= limit:
        return line
    return f"{line[:limit]}… ({len(line) - limit} more characters)"


def first_line(error: BaseException) -> str:
    """Of its message, with the second one where the first only announces it; its type where it has
    none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
