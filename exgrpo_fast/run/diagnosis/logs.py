"""Metrics of a run as series of one vocabulary, whichever trainer wrote them.

Read are a run directory of ours (`metrics.jsonl`), TRL's `trainer_state.json` in its output or
checkpoint folder, and the JSON lines of verl's file logger.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.report.reading import read_run

Step = Mapping[str, Any]
Series = list[tuple[int, float]]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _named(*keys: str) -> Callable[[Step], float | None]:
    """The first of `keys` that holds a finite number."""

    def read(step: Step) -> float | None:
        return next((n for key in keys if (n := _number(step.get(key))) is not None), None)

    return read


def _total(*keys: str) -> Callable[[Step], float | None]:
    """The sum of `keys`; None where a step has none of them."""

    def read(step: Step) -> float | None:
        found = [n for key in keys if (n := _number(step.get(key))) is not None]
        return sum(found) if found else None

    return read


def _learnable_complement(step: Step) -> float | None:
    learnable = _number(step.get("learnable_frac"))
    return None if learnable is None else 1.0 - learnable


def _error_share(step: Step) -> float | None:
    """Share of trajectories whose reward failed, of those with a reason."""
    reasons = step.get("reasons")
    if not isinstance(reasons, dict) or not sum(reasons.values()):
        return None
    errors = sum(n for reason, n in reasons.items() if reason.startswith("error"))
    return errors / sum(reasons.values())


# One entry for each signal that a check reads; a trainer lacks what it does not log.
EXGRPO = {
    "reward": _named("reward_mean"),
    "zero_variance": _learnable_complement,
    "all_fail": _named("all_fail_frac"),
    "all_pass": _named("all_pass_frac"),
    "entropy": _named("entropy"),
    "clip_frac": _total("clip_frac_low", "clip_frac_high"),
    "kl_ref": _named("kl_ref"),
    "kl_behaviour": _named("approx_kl"),
    "mismatch": _named("mismatch_mean"),
    "truncated": _named("truncated_frac"),
    "length": _named("completion_len_mean"),
    "reward_errors": _error_share,
    "grad_norm": _named("grad_norm"),
    "lr": _named("lr"),
    "skipped_updates": _named("skipped"),
}
TRL = {
    "reward": _named("reward"),
    "zero_variance": _named("frac_reward_zero_std"),
    "entropy": _named("entropy"),
    "clip_frac": _named("clip_ratio/region_mean", "cispo_clip_ratio"),
    "kl_ref": _named("kl"),
    "mismatch": _named("sampling/sampling_logp_difference/mean"),
    "truncated": _named("completions/clipped_ratio"),
    "length": _named("completions/mean_length"),
    "grad_norm": _named("grad_norm"),
    "lr": _named("learning_rate"),
}
VERL = {
    "reward": _named("critic/score/mean", "critic/rewards/mean"),
    "entropy": _named("actor/entropy", "actor/entropy_loss"),
    "clip_frac": _named("actor/pg_clipfrac"),
    "kl_ref": _named("actor/kl_loss"),
    "kl_behaviour": _named("actor/ppo_kl"),
    "mismatch": _named("training/rollout_probs_diff_mean"),
    "truncated": _named("response_length/clip_ratio"),
    "length": _named("response_length/mean"),
    "grad_norm": _named("actor/grad_norm"),
    "lr": _named("actor/lr"),
}
SIGNALS = {"exgrpo-fast": EXGRPO, "TRL": TRL, "verl": VERL}


@dataclass(frozen=True)
class Log:
    """The series of one run; a signal that the trainer does not log is an empty one."""

    trainer: str  # exgrpo-fast, TRL or verl
    series: dict[str, Series]
    config: dict[str, Any] = field(default_factory=dict)  # ours alone

    def values(self, signal: str) -> list[float]:
        return [value for _, value in self.series.get(signal, [])]

    @property
    def num_steps(self) -> int:
        return max((len(points) for points in self.series.values()), default=0)


def make_log(trainer: str, steps: list[tuple[int, Step]], config: dict[str, Any]) -> Log:
    readers = SIGNALS[trainer]
    series = {
        name: [(at, n) for at, step in steps if (n := read(step)) is not None]
        for name, read in readers.items()
    }
    return Log(trainer, series, config)


def read_log(path: Path) -> Log:
    """The log at `path`: a folder or a file; UserError where nothing readable is there."""
    if not path.exists():
        raise UserError(f"diagnose: there is no '{path}'")
    for read in (_read_ours, _read_trl, _read_verl):
        if (log := read(path)) is not None and log.num_steps:
            return log
    raise UserError(
        f"diagnose: '{path}' has no metrics.jsonl, no trainer_state.json of TRL "
        "and no JSON lines of verl's file logger"
    )


def _read_ours(path: Path) -> Log | None:
    folder = path.parent if path.name == "metrics.jsonl" else path
    if not (folder / "metrics.jsonl").is_file():
        return None
    run = read_run(folder)
    return make_log("exgrpo-fast", [(step["step"], step) for step in run.steps], run.config)


def _read_trl(path: Path) -> Log | None:
    name = "trainer_state.json"
    states = [path] if path.name == name else list(path.glob(f"**/{name}"))
    if not states:
        return None
    newest = max(states, key=lambda state: state.stat().st_mtime)
    try:
        history = json.loads(newest.read_text())["log_history"]
        entries = [e for e in history if isinstance(e, dict) and "reward" in e]
        return make_log("TRL", [(int(e["step"]), e) for e in entries], {})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_verl(path: Path) -> Log | None:
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    for file in files:
        steps: dict[int, Step] = {}
        for line in file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("data"), dict):
                steps[int(record.get("step", len(steps)))] = record["data"]
        if steps:
            return make_log("verl", sorted(steps.items()), {})
    return None
