"""What a person sees while a run goes on: a live screen on a terminal, plain lines elsewhere.

A line leads with what tells whether the policy learns (reward, pass@1, learnable share, entropy)
and how fast (tokens per second). The loss is not on it: in policy gradients its value says nothing,
and a newcomer reads 0.0000 as a broken run. It is in metrics.jsonl.

Every text passes `clean_text`: completions are written by the policy, and a terminal obeys.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

from exgrpo_fast.run.display.completions import best_and_worst, excerpt, verdict_line
from exgrpo_fast.run.display.live import RichScreen
from exgrpo_fast.run.display.numbers import (
    duration,
    finite,
    largest_pass_at_k,
    number_of,
    percent,
    short,
    sparkline,
)
from exgrpo_fast.run.display.plain import PlainScreen
from exgrpo_fast.run.display.screen import Advance, NullScreen, Row, Screen
from exgrpo_fast.run.display.steps import Clock, StepLine, StepReader, evaluation_line, plain_line

__all__ = [
    "Advance",
    "Clock",
    "NullScreen",
    "PlainScreen",
    "RichScreen",
    "Row",
    "Screen",
    "StepLine",
    "StepReader",
    "best_and_worst",
    "duration",
    "evaluation_line",
    "excerpt",
    "finite",
    "largest_pass_at_k",
    "make_screen",
    "number_of",
    "percent",
    "plain_line",
    "short",
    "sparkline",
    "verdict_line",
]


def make_screen(stream: TextIO | None = None) -> Screen:
    """A live screen on a terminal that can show one, plain lines elsewhere.

    NO_COLOR keeps the live screen and takes its colours, as no-color.org asks.
    """
    stream = sys.stdout if stream is None else stream
    on_terminal = bool(getattr(stream, "isatty", lambda: False)())
    can_draw = os.environ.get("TERM", "") not in {"dumb", "unknown"}
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    if not (on_terminal and can_draw and encoding == "utf8"):
        return PlainScreen(stream)
    no_color = bool(os.environ.get("NO_COLOR"))
    return RichScreen(Console(file=stream, highlight=False, no_color=no_color))
