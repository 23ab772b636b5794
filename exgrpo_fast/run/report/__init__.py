"""report.html: one self-contained page about what a run did and whether it learned.

Reads the run directory alone, and accepts files that are missing, short or torn: a report is most
useful after a run that failed. The figures are SVG drawn here, so that they are
small, sharp, follow the reader's light or dark theme, and need nothing from the network.
"""

from __future__ import annotations

import os
from pathlib import Path

from exgrpo_fast.run.report.page import render
from exgrpo_fast.run.report.reading import Run, read_run

__all__ = ["Run", "read_run", "render", "write_report"]


def write_report(run_dir: Path | str) -> Path:
    """Write DIR/report.html from what DIR holds, and return its path."""
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    temporary = run_dir / f".report.{os.getpid()}.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, run_dir / "report.html")
    return run_dir / "report.html"
