"""`exgrpo-fast check-data`: every malformed row of a file."""

from __future__ import annotations

import argparse
from typing import Any

from exgrpo_fast import data
from exgrpo_fast.cli.arguments import add_command, add_fields, require_file
from exgrpo_fast.cli.output import print_lines


def add_check_data(commands: Any) -> None:
    text = "every bad row of a file, with line and reason"
    c = add_command(commands, "check-data", check_data, text)
    c.add_argument("file", metavar="FILE", help="as data.train: .jsonl, .json, .parquet")
    add_fields(c)


def check_data(arguments: argparse.Namespace) -> int:
    """Exit code 1 where a row is malformed."""
    require_file(arguments.file, "check-data")
    report = data.check_data(
        arguments.file, prompt_field=arguments.prompt_field, answer_field=arguments.answer_field
    )
    for note in report.notes:
        print_lines(note)
    for row in report.bad_rows:
        print_lines(f"{row.where}: {row.reason}")
    print(f"{report.num_good} good rows, {len(report.bad_rows)} bad ones")
    return 1 if report.bad_rows else 0
