"""`exgrpo-fast diagnose`: what is wrong with a run, from its metrics."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command
from exgrpo_fast.cli.output import print_lines
from exgrpo_fast.run.diagnosis.checks import diagnose as find
from exgrpo_fast.run.diagnosis.logs import read_log


def add_diagnose(commands: Any) -> None:
    text = "what is wrong with a run, since when, and which key mends it; runs of TRL and verl too"
    c = add_command(commands, "diagnose", diagnose, text)
    c.add_argument(
        "path", metavar="RUN", help="run directory, TRL's output folder, verl's JSON lines"
    )
    c.add_argument("--json", action="store_true", help="findings as JSON")


def diagnose(arguments: argparse.Namespace) -> int:
    """0: nothing is wrong; 1: something is."""
    log = read_log(Path(arguments.path))
    findings = find(log)
    if arguments.json:
        report = {"trainer": log.trainer, "steps": log.num_steps}
        print(json.dumps(report | {"findings": [asdict(finding) for finding in findings]}))
    else:
        print(f"{log.trainer}, {log.num_steps} steps")
        for finding in findings:
            print_lines(finding.line(), indent=" " * 7)
        if not findings:
            print("nothing to report")
    return int(any(finding.is_wrong for finding in findings))
