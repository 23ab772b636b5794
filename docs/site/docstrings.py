"""Docstrings of this project are plain text: a paragraph with aligned columns keeps its lines, and
the comments behind the fields of a dataclass describe them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S")
COMMENT = re.compile(r" {2}# (.+)$")


class PlainText(griffe.Extension):
    """Fences the paragraphs that hold columns or formulas; makes a table of the fields of a class."""

    def on_object(self, *, obj: griffe.Object, **other: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = fenced(obj.docstring.value)
        if isinstance(obj, griffe.Class):
            lines = [f"    {name}: {comment}" for name, comment in fields(obj)]
            if any(not line.endswith(": ") for line in lines):
                obj.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def fields(obj: griffe.Class) -> Iterator[tuple[str, str]]:
    """Name and comment of the annotated fields; of a field without a comment, \"\"."""
    for name, member in obj.members.items():
        if isinstance(member, griffe.Attribute) and member.annotation and name[0] != "_":
            if "property" not in member.labels and not member.has_docstring:
                found = COMMENT.search(member.lines[-1] if member.lines else "")
                yield name, found[1] if found else ""


def fenced(text: str) -> str:
    return "\n\n".join(map(_fenced_paragraph, re.split(r"\n{2,}", text)))


def _fenced_paragraph(paragraph: str) -> str:
    is_code = all(line.startswith("    ") for line in paragraph.splitlines())
    if is_code or not COLUMNS.search(paragraph):
        return paragraph
    return f"```text\n{paragraph}\n```"
