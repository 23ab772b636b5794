"""Docstrings of this project are plain text: a paragraph with aligned columns keeps its lines."""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S")


class AlignedParagraphs(griffe.Extension):
    """Fences the paragraphs that hold columns or formulas, so that Markdown leaves them alone."""

    def on_object(self, *, obj: griffe.Object, **other: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    return "\n\n".join(map(_fenced_paragraph, re.split(r"\n{2,}", text)))


def _fenced_paragraph(paragraph: str) -> str:
    is_code = all(line.startswith("    ") for line in paragraph.splitlines())
    if is_code or not COLUMNS.search(paragraph):
        return paragraph
    return f"```text\n{paragraph}\n```"
