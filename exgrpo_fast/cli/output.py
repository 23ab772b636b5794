"""Text for people: wrapped on a terminal, one line each in a pipe or a file."""

from __future__ import annotations

import shutil
import sys
import textwrap

UNWRAPPED = 10_000  # columns of a pipe or a file


def terminal_width() -> int:
    """Columns of the terminal that standard output is, `UNWRAPPED` where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNWRAPPED


def print_lines(text: str, *, indent: str = "    ") -> None:
    """Print each line of the text, wrapped as below where the terminal is narrower."""
    width = terminal_width()
    for line in text.splitlines():
        print(wrapped(line, width, indent=indent))


def wrapped(line: str, width: int, *, indent: str = "    ") -> str:
    """The line in as many as it needs, broken between words, all but the first indented."""
    return textwrap.fill(
        line,
        max(width, len(indent) + 30),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
