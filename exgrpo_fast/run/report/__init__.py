"""report.html: one self-contained page about what a run did and whether it learned.

Reads the run directory alone, and accepts files that are missing, short or torn: a report is most
useful after a run that failed. The figures are SVG drawn here, so that they are
small, sharp, follow the reader's light or dark theme, and need nothing from the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.files import whole_file
from exgrpo_fast.run.report.comparison import MAX_RUNS
from exgrpo_fast.run.report.page import render, render_comparison
from exgrpo_fast.run.report.reading import Run, read_run, read_runs

__all__ = ["Run", "make_page", "read_run", "read_runs", "render", "write_page", "write_report"]


def write_report(run_dir: Path | str) -> Path:
    """Write DIR/report.html from what DIR holds, and return its path.

    For the run itself, at its end: its lock is still held, and the page must not say that it runs.
    """
    path = Path(run_dir) / "report.html"
    write_page(path, render(replace(read_run(Path(run_dir)), is_running=False)))
    return path


def make_page(folders: Sequence[Path], *, live: bool = False) -> str:
    """The page of one run, or of several beside each other. UserError in one line for what is none.

    `live`: a page that asks its server for a newer one, also before the first step has finished.
    """
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one page: at most {MAX_RUNS}")
    runs = read_runs(folders, may_be_empty=live)
    return render(runs[0], live=live) if len(runs) == 1 else render_comparison(runs, live=live)


def write_page(path: Path, page: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
