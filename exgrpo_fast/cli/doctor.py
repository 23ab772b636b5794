"""`exgrpo-fast doctor`: what is installed, what works, and what is missing; for bug reports, too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import (
    add_command,
    add_memory,
    check_before_torch,
    require_file,
    require_model,
)
from exgrpo_fast.cli.machine import collect
from exgrpo_fast.cli.memory_plan import show_plan
from exgrpo_fast.cli.output import UNWRAPPED, terminal_width, wrapped
from exgrpo_fast.config import load_config, validate
from exgrpo_fast.core.text import clean_line


def add_doctor(commands: Any) -> None:
    c = add_command(
        commands, "doctor", doctor, "what is installed, what works, what is missing for what"
    )
    c.add_argument(
        "--model",
        metavar="FOLDER",
        help="check the forward pass of this model, and that vLLM can run it",
    )
    c.add_argument("--json", action="store_true", help="the same as JSON")
    c.add_argument(
        "--config", metavar="CONFIG", help="show the memory plan of this config or recipe as well"
    )
    add_memory(c)


def doctor(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config) if arguments.config else None
    if arguments.model:
        require_file(arguments.model, "--model")
        require_model(arguments.model, "--model")
        check_before_torch(validate({"model": {"name": arguments.model}}), {})
    report = collect(model=Path(arguments.model) if arguments.model else None)
    text = json.dumps(report, indent=2)
    print(text if arguments.json else render(report, columns=terminal_width()))
    if config is not None:
        return show_plan(config, None, arguments.device_memory_gib)
    return 0


def render(report: dict[str, Any], *, columns: int = UNWRAPPED) -> str:
    """The report as text: a check, and what to do about it, in as many lines as it needs."""
    width = max(len(check["name"]) for check in report["checks"])
    indent = " " * (width + 8)
    lines = [f"python {report['python']} on {report['platform']}", ""]
    for check in report["checks"]:
        mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[check["status"]]
        text = "; ".join(part for part in (check["detail"], check["advice"]) if part)
        text = clean_line(f"{mark}  {check['name']:<{width}}  {text}")
        lines += wrapped(text, columns, indent=indent).splitlines()
    counts = {s: sum(c["status"] == s for c in report["checks"]) for s in ("ok", "warn", "fail")}
    verdict = "ready to train" if report["ok"] else "not ready: see FAIL above"
    lines += ["", f"{verdict} ({counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail)"]
    return "\n".join(clean_line(line) for line in lines) + "\n"
