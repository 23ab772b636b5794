"""`exgrpo-fast report`: the page of a run, or of several beside each other, at any time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.report import make_page, write_page


def add_report(commands: Any) -> None:
    text = "the page of a run that runs, has stopped or has ended, or of several beside each other"
    c = add_command(commands, "report", report, text)
    c.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory")
    c.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="default: report.html in the run directory; of several runs, comparison.html here",
    )


def report(arguments: argparse.Namespace) -> int:
    runs: list[Path] = arguments.runs
    page = make_page(runs)
    out = arguments.out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    try:
        write_page(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    print(out)
    return 0
