"""Several runs beside each other: results with intervals, size, and what differs in their configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from exgrpo_fast.run.display.formatting import duration, short
from exgrpo_fast.run.report.completions import safe_text
from exgrpo_fast.run.report.figures import evaluations
from exgrpo_fast.run.report.headline import peak_memory, percent, progress, wall_seconds
from exgrpo_fast.run.report.reading import Run, flat, interval
from exgrpo_fast.run.report.svg import Line, Measured, change_figure, line_figure

MAX_RUNS = 6  # as many as there are colours
MAX_DIFFERENCES = 200
UNKNOWN = "–"


def results(runs: Sequence[Run]) -> str:
    """A row for each run, and its held-out accuracy drawn."""
    cells = {
        "steps": progress,
        "held-out before": lambda run: _evaluated(run.evaluation("eval_before")),
        "held-out after": lambda run: _evaluated(run.evaluation("eval_after")),
        "change": _change,
        "last reward": _last_reward,
        "wall time": lambda run: duration(seconds) if (seconds := wall_seconds(run)) else "",
        "peak memory": lambda run: f"{peak:.1f} GiB" if (peak := peak_memory(run)) else "",
        "tokens generated": lambda run: short(run.total("tokens_generated")),
    }
    columns = {title: [escape(cell(run)) for run in runs] for title, cell in cells.items()}
    known = {title: column for title, column in columns.items() if any(column)}
    rows = [_names(runs), *known.values()]
    table = _table("Results", ["run", *known], list(zip(*rows, strict=True)))
    return f"<h2>Results</h2>{table}<div class=grid>{_drawn_results(runs)}</div>"


def _drawn_results(runs: Sequence[Run]) -> str:
    changes = [(r.name, _measured(r, "eval_before"), _measured(r, "eval_after")) for r in runs]
    marks = [evaluations(run, colour) for colour, run in enumerate(runs, start=1)]
    lines = [
        Line(run.name, [(mark.x, mark.y) for mark in of_run], colour, smooth=False)
        for colour, (run, of_run) in enumerate(zip(runs, marks, strict=True), start=1)
    ]
    note = "Hollow before, filled after training; 95 % intervals, where they were measured."
    return change_figure("Held-out accuracy", changes, note=note) + line_figure(
        "Held-out accuracy by step", lines, marks=[m for each in marks for m in each]
    )


def _measured(run: Run, key: str) -> Measured | None:
    found = run.evaluation(key)
    return Measured(float(found["avg_at_n"]), interval(found)) if found else None


def _evaluated(evaluation: Mapping[str, Any] | None) -> str:
    """'71.0 % [59.0, 82.0]'"""
    if evaluation is None:
        return ""
    if (bounds := interval(evaluation)) is None:
        return percent(evaluation["avg_at_n"])
    low, high = (f"{100 * bound:.1f}" for bound in bounds)
    return f"{percent(evaluation['avg_at_n'])} [{low}, {high}]"


def _change(run: Run) -> str:
    before, after = run.evaluation("eval_before"), run.evaluation("eval_after")
    if not (before and after):
        return ""
    return f"{100 * (after['avg_at_n'] - before['avg_at_n']):+.1f} points"


def _last_reward(run: Run) -> str:
    """Mean over the last tenth of the steps: a single step is noise."""
    rewards = run.values("reward_mean")
    last = rewards[-max(1, len(rewards) // 10) :]
    return f"{sum(last) / len(last):.3f}" if last else ""


def differences(runs: Sequence[Run]) -> str:
    """The keys of config and environment whose values are not the same in all runs."""
    configs = [dict(flat(run.config)) for run in runs]
    environments = [dict(flat(run.shown_environment)) for run in runs]
    return (
        "<h2>What differs</h2>"
        + _differing("Configuration", runs, configs)
        + _differing("Environment", runs, environments)
    )


def _differing(title: str, runs: Sequence[Run], trees: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = [
        (safe_text(key, 200), *(safe_text(tree.get(key, UNKNOWN), 300) for tree in trees))
        for key in keys
        if len({str(tree.get(key)) for tree in trees}) > 1
    ]
    if not rows:
        return f"<h3>{escape(title)}</h3><p>No difference.</p>"
    more = len(rows) - MAX_DIFFERENCES
    table = _table(title, ["key", *_names(runs)], rows[:MAX_DIFFERENCES])
    return f"<h3>{escape(title)}</h3>{table}" + (f"<p>{more} more keys.</p>" if more > 0 else "")


def _names(runs: Sequence[Run]) -> list[str]:
    """With the colour that each run has in the figures."""
    return [
        f'<i class="f{colour}"></i>{safe_text(run.name, 200)}'
        for colour, run in enumerate(runs, start=1)
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML. On a narrow screen it scrolls sideways by itself."""
    names = "".join(f"<th scope=col>{name}</th>" for name in head)
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide {title.lower()}" tabindex=0 role=region aria-label="{escape(title)}">'
        f"<table><tr>{names}</tr>{body}</table></div>"
    )
