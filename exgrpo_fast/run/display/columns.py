"""The table of the latest steps: which columns there are, which of them fit, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from exgrpo_fast.run.display.formatting import duration, percent, short
from exgrpo_fast.run.display.steps import StepLine


@dataclass(frozen=True)
class Column:
    title: str
    width: int
    text: Callable[[StepLine], str]
    style: Callable[[StepLine], str] = lambda line: ""
    keep: int = 0  # on a narrow terminal the columns with the lowest number go first


def _change_style(line: StepLine) -> str:
    return "" if not line.change else ("green" if line.change > 0 else "red")


def _warn(key: str, when: Callable[[float], bool]) -> Callable[[StepLine], str]:
    def style(line: StepLine) -> str:
        value = line.number(key)
        return "yellow" if value is not None and when(value) else ""

    return style


def _tokens_per_second(line: StepLine) -> str:
    """Rollout speed; over the whole step when the engine reports none."""
    if rate := line.show("tokens_per_second_rollout", short):
        return rate
    tokens, seconds = line.number("tokens_generated"), line.number("step_seconds")
    return short(tokens / seconds) if tokens and seconds else ""


COLUMNS = (
    Column(
        "step",
        9,
        lambda s: f"{'! ' if s.skipped else ''}{s.step}/{s.total_steps}",
        lambda s: "bold yellow" if s.skipped else "",
        keep=99,
    ),
    Column("reward", 6, lambda s: s.show("reward_mean", ".3f"), lambda s: "bold", keep=98),
    Column("±", 6, StepLine.show_change, _change_style, keep=3),
    Column("pass@1", 6, lambda s: s.show("pass_at_1", ".3f"), keep=97),
    Column(
        "learnable",
        9,
        lambda s: s.show("learnable_frac", percent),
        _warn("learnable_frac", lambda share: share < 0.1),  # nine in ten groups teach nothing
        keep=96,
    ),
    Column("entropy", 7, lambda s: s.show("entropy", ".3f"), keep=95),
    Column("tok/s", 6, _tokens_per_second, keep=94),
    Column("train tok/s", 11, lambda s: s.show("tokens_per_second_train", short), keep=1),
    Column("replay", 6, lambda s: s.show("replay_frac", percent) if s.replays else "", keep=8),
    Column("length", 6, lambda s: s.show("completion_len_mean", short), keep=7),
    Column(
        "cut",
        5,
        lambda s: s.show("truncated_frac", percent),
        _warn("truncated_frac", lambda share: share > 0.2),  # the limit starts to decide rewards
        keep=2,
    ),
    Column("time", 6, lambda s: s.show("step_seconds", duration), keep=6),
    Column("GiB", 5, lambda s: s.show("peak_memory_gib", ".1f"), keep=4),
    Column("eta", 6, StepLine.show_eta, keep=5),
)


def fitting_columns(width: int) -> list[Column]:
    """The columns that fit side by side, two spaces between them, the important ones kept."""
    kept = list(COLUMNS)
    while len(kept) > 1 and sum(c.width + 2 for c in kept) - 2 > width:
        kept.remove(min(kept, key=lambda column: column.keep))
    return kept


def header_text(columns: Sequence[Column]) -> Text:
    return Text("  ".join(c.title.rjust(c.width) for c in columns), "dim", no_wrap=True)


def row_text(line: StepLine, columns: Sequence[Column]) -> Text:
    row = Text(no_wrap=True, overflow="ellipsis")
    for number, column in enumerate(columns):
        value = column.text(line)
        style = column.style(line) if value else "dim"
        row.append("  " if number else "").append((value or "–").rjust(column.width), style)
    return row
