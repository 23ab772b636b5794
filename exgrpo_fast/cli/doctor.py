"""`exgrpo-fast doctor`: what is installed, what works, and what is missing; for bug reports, too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command, add_memory, require_file
from exgrpo_fast.cli.machine import collect
from exgrpo_fast.cli.memory_plan import show_plan
from exgrpo_fast.config import load_config
from exgrpo_fast.core.text import clean_line


def add_doctor(commands: Any) -> None:
    c = add_command(
        commands, "doctor", doctor, "what is installed, what works, what is missing for what"
    )
    c.add_argument(
        "--model", help="a folder whose forward pass is checked, and that vLLM is to run"
    )
    c.add_argument("--json", action="store_true")
    c.add_argument("--config", help="show the memory plan of this config or recipe as well")
    add_memory(c)


def doctor(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config) if arguments.config else None
    if arguments.model:
        require_file(arguments.model, "--model")
    report = collect(model=Path(arguments.model) if arguments.model else None)
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    if config is not None:
        return show_plan(config, None, arguments.device_memory_gib)
    return 0


def render(report: dict[str, Any]) -> str:
    """The report as text: one line a check, with what to do about it."""
    width = max(len(check["name"]) for check in report["checks"])
    lines = [f"python {report['python']} on {report['platform']}", ""]
    for check in report["checks"]:
        mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[check["status"]]
        text = "; ".join(part for part in (check["detail"], check["advice"]) if part)
        lines.append(f"{mark}  {check['name']:<{width}}  {text}")
    counts = {s: sum(c["status"] == s for c in report["checks"]) for s in ("ok", "warn", "fail")}
    verdict = "ready to train" if report["ok"] else "not ready: see FAIL above"
    lines += ["", f"{verdict} ({counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail)"]
    return "\n".join(clean_line(line) for line in lines) + "\n"
