"""The result of the run in one sentence, before and after, and its size in a few numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from datetime import datetime
from html import escape
from typing import Any

from exgrpo_fast.run.display.formatting import duration, largest_pass_at_k, number_of, short
from exgrpo_fast.run.report.reading import Run, interval

Evaluation = Mapping[str, Any]


def headline(run: Run) -> str:
    """The held-out change where it was measured, else that of the training reward."""
    before, after = run.evaluation("eval_before"), run.evaluation("eval_after")
    if before and after:
        return _evaluated(before, after)
    rewards = run.values("reward_mean")
    if not rewards:
        return "<p class=lead>No step has finished yet.</p>"
    if len(rewards) == 1:
        return f"<p class=lead>One step has finished, with a mean reward of {rewards[0]:.3f}.</p>"
    part = max(1, len(rewards) // 10)
    first, last = sum(rewards[:part]) / part, sum(rewards[-part:]) / part
    lead = "There is no held-out evaluation before and after: only the training reward is known."
    if before:
        lead = f"Held-out accuracy was {percent(before['avg_at_n'])} before training."
    change = _change("training reward", first, last, show="{:.3f}".format)
    return f"<div class=change>{change}</div><p class=lead>{lead}</p>"


def _evaluated(before: Evaluation, after: Evaluation) -> str:
    old, new = before["avg_at_n"], after["avg_at_n"]
    n, questions = number_of(after, "n"), number_of(after, "questions")
    truncated = number_of(before, "truncated"), number_of(after, "truncated")
    changes = (
        _change(f"held-out avg@{n:.0f}" if n else "held-out accuracy", old, new),
        _pass_at_k_change(before, after),
        _change("cut at the limit", *truncated, good=-1),
    )
    sample = f" on {questions:.0f} questions" if questions else ""
    return (
        f"<div class=change>{''.join(changes)}</div>"
        f"<p class=lead>{_movement(old, new)}{sample}. {_certainty(before, after)}</p>"
    )


def _pass_at_k_change(before: Evaluation, after: Evaluation) -> str:
    """'' unless both were measured with the same k, and that says more than avg@n."""
    old, new = (largest_pass_at_k(each.get("pass_at_k")) for each in (before, after))
    if not (old and new and old[0] == new[0] > 1):
        return ""
    return _change(f"held-out pass@{new[0]}", old[1], new[1])


def _movement(old: float, new: float) -> str:
    points = 100 * (new - old)
    if abs(points) < 0.05:
        return "Held-out accuracy did not move"
    return f"Held-out accuracy {'rose' if points > 0 else 'fell'} by {abs(points):.1f} points"


def _certainty(before: Evaluation, after: Evaluation) -> str:
    old, new = interval(before), interval(after)
    if old is None or new is None:
        return ""
    was, became = (f"{percent(low)} to {percent(high)}" for low, high in (old, new))
    spans = f"{was} before, {became} after"
    if new[0] > old[1] or new[1] < old[0]:
        return f"The 95 % intervals ({spans}) do not touch."
    return f"The 95 % intervals ({spans}) overlap: chance alone may explain it."


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"  # no line break before the sign


def _change(
    name: str,
    old: float | None,
    new: float | None,
    *,
    show: Callable[[float], str] = percent,
    good: int = 1,
) -> str:
    """'name: old → new', '' unless both are known; `good` is the sign of an improvement."""
    if old is None or new is None:
        return ""
    css = "" if new == old else ("up" if (new - old) * good > 0 else "down")
    return (
        f"<div><small>{escape(name)}</small>"
        f'<b><s>{show(old)}</s> <em>→</em> <span class="{css}">{show(new)}</span></b></div>'
    )


def status(run: Run, *, live: bool) -> str:
    """'running · step 12 of 24', 'stopped · step 12 of 24'; '' for a run that is complete.

    A page that is not `live` says when that was so.
    """
    is_complete = run.max_steps is not None and run.last_step >= run.max_steps
    if run.is_running:
        mean = statistics.fmean(seconds) if (seconds := run.values("step_seconds")[-10:]) else 0
        pace = f" · {duration(mean)} a step" if mean else ""
        when = "" if live else f" · at {datetime.now():%Y-%m-%d %H:%M}"
        return f"<p class=status><b>running</b> · step {progress(run)}{pace}{when}</p>"
    if is_complete or run.max_steps is None:
        return ""
    return f"<p class=status><b>stopped</b> · step {progress(run)}</p>"


def progress(run: Run) -> str:
    """'12 of 24', or '24' where that is all, or where the end is not known."""
    if run.max_steps is None or run.last_step >= run.max_steps:
        return str(run.last_step)
    return f"{run.last_step} of {run.max_steps}"


def wall_seconds(run: Run) -> float:
    """Of the whole command; while it runs, of the steps alone."""
    return number_of(run.summary, "wall_seconds") or run.total("step_seconds")


def peak_memory(run: Run) -> float | None:
    """GiB."""
    peaks = run.values("peak_memory_gib")
    return number_of(run.summary, "peak_memory_gib") or max(peaks, default=None)


FEW_STEPS = 5


def signal(run: Run) -> str:
    """How many completions were correct and how many groups carried no gradient, early and late."""
    shares = run.values("learnable_frac"), run.values("pass_at_1_fresh")
    if not all(shares):
        return ""
    early, late = (
        [statistics.fmean(values) for values in part]
        for part in zip(*((v[:FEW_STEPS], v[-FEW_STEPS:]) for v in shares), strict=True)
    )
    number = min(FEW_STEPS, len(shares[0]))
    steps = f"{number} steps" if number > 1 else "step"
    text = f"In the first {steps}, {_signal(*early)}."
    if len(shares[0]) > FEW_STEPS:
        text += f" In the last {number}, {_signal(*late)}."
    return f"<p>{text}</p>"


def _signal(learnable: float, correct: float) -> str:
    correct_share, flat_share = (f"{100 * share:.0f}\u00a0%" for share in (correct, 1 - learnable))
    return (
        f"{correct_share} of completions are correct and {flat_share} of groups carry no gradient"
    )


def facts(run: Run) -> str:
    """Size and duration of the run."""
    seconds, peak = wall_seconds(run), peak_memory(run)
    generated, trained = run.total("tokens_generated"), run.total("tokens_trained")
    rates = run.values("tokens_per_second_rollout")
    skipped = sum(1 for step in run.steps if step.get("skipped"))
    pairs = [
        ("steps", str(len(run.steps) or run.summary.get("steps", 0))),
        ("wall time", duration(seconds) if seconds else ""),
        ("peak memory", f"{peak:.1f} GiB" if peak else ""),
        ("tokens generated", short(generated) if generated else ""),
        ("tokens trained", short(trained) if trained else ""),
        ("rollout", f"{short(statistics.median_high(rates))} tok/s" if rates else ""),
        ("updates skipped", str(skipped) if skipped else ""),
    ]
    shown = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs if v)
    return f"<dl class=facts>{shown}</dl>"
