"""`exgrpo-fast doctor`: what is installed, what works, and what is missing; for bug reports, too."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import (
    add_command,
    add_memory,
    check_before_torch,
    choose_device,
    require_file,
    require_model,
)
from exgrpo_fast.cli.machine import ABSENT, Check, collect, version_of, vllm_check
from exgrpo_fast.cli.memory_plan import show_plan
from exgrpo_fast.cli.output import UNWRAPPED, terminal_width, wrapped
from exgrpo_fast.config import load_config, validate
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line
from exgrpo_fast.rewards import RewardPool, RewardSample
from exgrpo_fast.rollout.vllm.versions import import_trouble


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
    report = examine(model=Path(arguments.model) if arguments.model else None)
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


# --- self-tests ----------------------------------------------------------------------------------


def examine(*, model: Path | None = None) -> dict[str, Any]:
    """What `collect` finds, and what of it works. `model`: a folder whose forward pass is checked,
    and that vLLM is to run."""
    found = collect(model=model)
    tried = self_tests(found, model)
    return {
        **found,
        "ok": found["ok"] and all(check.status != "fail" for check in tried),
        "checks": [*found["checks"], *map(asdict, tried)],
    }


def self_tests(found: dict[str, Any], model: Path | None) -> list[Check]:
    """The fused loss against float64 on each device, a reward worker, the model, vLLM's import."""
    torch_version = found["packages"]["torch"]
    if torch_version == ABSENT:
        return []
    return [
        *(
            attempt(f"fused loss on {d['name']}", partial(fused_loss_test, d["id"]))
            for d in found["devices"]
        ),
        attempt("reward worker", reward_worker_test),
        *([check_forward_pass(model)] if model else []),
        *try_vllm(torch_version),
    ]


def attempt(name: str, test: Callable[[], str]) -> Check:
    """Run a test that returns what it found; whatever it raises is a finding."""
    started = time.perf_counter()
    try:
        detail = test()
    except UserError as error:
        return Check(name, "fail", clean_line(str(error), max_line=300))
    except Exception as error:  # any failure of any layer: this is where it is to be seen
        cause = clean_line(f"{type(error).__name__}: {error}", max_line=200)
        return Check(name, "fail", cause, "please report this, with the whole output")
    return Check(name, "ok", f"{detail} ({time.perf_counter() - started:.1f} s)")


def fused_loss_test(device: str) -> str:
    """Loss and gradients of the fused policy loss on tiny inputs, against float64 PyTorch."""
    from exgrpo_kernels.self_check import compare_with_float64

    found = compare_with_float64(device)
    for error in found:
        if not error.is_within_bound:
            raise ArithmeticError(
                f"{error.part} is off by {error.fused:.1e}, plain PyTorch by {error.plain:.1e}"
            )
    return f"largest error {max(error.fused for error in found):.0e}"


def check_forward_pass(model: Path) -> Check:
    """That every way through the model gives the same log-probs; a refusal is a finding."""
    from exgrpo_fast.build.forward import check_model

    device = choose_device(None)
    return attempt("forward pass", lambda: check_model(str(model), device=device))


def reward_worker_test() -> str:
    """Start a reward worker and score a correct and an incorrect answer."""
    samples = [RewardSample("2 + 2 =", f"\\boxed{{{n}}}", "4", {}) for n in (4, 5)]
    with RewardPool(["math_verify"], workers=1, timeout_seconds=30.0) as pool:
        rewards = [verdict.reward for verdict in pool.score(samples)]
    if rewards != [1.0, 0.0]:
        raise ArithmeticError(f"a correct and an incorrect answer were given {rewards}")
    return "a correct and an incorrect answer were scored as such"


def try_vllm(torch_version: str) -> list[Check]:
    """Import vLLM in a subprocess, if it is installed."""
    if version_of("vllm") == ABSENT:
        return []
    started = time.perf_counter()
    trouble = import_trouble(torch_version)
    if trouble is not None:
        return [vllm_check(trouble)]
    return [Check("vllm import", "ok", f"it imports ({time.perf_counter() - started:.1f} s)")]
