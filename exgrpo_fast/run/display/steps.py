"""A finished step: its change of reward, the remaining time, and its lines of text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from exgrpo_fast.core.types import Metrics
from exgrpo_fast.run.display.formatting import (
    duration,
    joined,
    largest_pass_at_k,
    named,
    number_of,
    percent,
    short,
)

Clock = Callable[[], float]


@dataclass(frozen=True)
class StepLine:
    """A finished step with what is computed over several of them."""

    metrics: Metrics
    step: int
    total_steps: int
    change: float | None  # of the reward, against the step before
    eta: float | None  # seconds

    def number(self, key: str) -> float | None:
        return number_of(self.metrics, key)

    def show(self, key: str, shape: str | Callable[[float], str]) -> str:
        """The value under `key` as text, '' when there is none."""
        value = self.number(key)
        if value is None:
            return ""
        return shape(value) if callable(shape) else format(value, shape)

    def show_change(self) -> str:
        return "" if self.change is None else f"{self.change:+.3f}"

    def show_eta(self) -> str:
        return "" if self.eta is None else duration(self.eta)

    @property
    def skipped(self) -> bool:
        return bool(self.metrics.get("skipped"))

    @property
    def replays(self) -> bool:
        """Whether this run replays; plain GRPO does not."""
        keys = ("replay_frac", "replay_size", "replay_active")
        return any(self.number(key) for key in keys) or "replay_buckets" in self.metrics


class StepReader:
    """Metrics of consecutive steps -> StepLines: changes and remaining time."""

    WINDOW = 20  # steps: long enough to even out evaluations, short enough to follow the lengths

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._reward: float | None = None
        self._last_seen: float | None = None
        self._seconds: deque[float] = deque(maxlen=self.WINDOW)

    def read(self, metrics: Metrics, total_steps: int) -> StepLine:
        reward = number_of(metrics, "reward_mean")
        change = None if reward is None or self._reward is None else reward - self._reward
        self._reward = reward
        step = int(number_of(metrics, "step") or 0)
        pace = self._pace(number_of(metrics, "step_seconds"))
        eta = None if pace is None else pace * max(total_steps - step, 0)
        return StepLine(dict(metrics), step, total_steps, change, eta)

    def _pace(self, step_seconds: float | None) -> float | None:
        """Mean seconds a step, evaluations and checkpoints between the steps included."""
        now, before = self._clock(), self._last_seen
        self._last_seen = now
        took = step_seconds if before is None else now - before
        if took is not None:
            self._seconds.append(took)
        return sum(self._seconds) / len(self._seconds) if self._seconds else None


def plain_line(line: StepLine) -> str:
    """The step on one line; what is not known is left out."""
    change, cut = line.show_change(), line.show("truncated_frac", percent)
    rollout = _pace_text(line, "tokens_per_second_rollout", "seconds_rollout")
    train = _pace_text(line, "tokens_per_second_train", "seconds_update")
    whole = "" if rollout or train else line.show("step_seconds", duration)
    replayed = line.show("replay_frac", percent) if line.replays else ""
    return joined(
        [
            f"step {line.step}/{line.total_steps}",
            named("reward", line.show("reward_mean", ".3f"), f" ({change})" if change else ""),
            named("pass@1", line.show("pass_at_1", ".3f")),
            named("learnable", line.show("learnable_frac", percent)),
            named("replay", replayed),
            named("entropy", line.show("entropy", ".3f")),
            named("len", line.show("completion_len_mean", short), f" (cut {cut})" if cut else ""),
            named("rollout", rollout),
            named("train", train),
            named("step", whole),
            named("peak", line.show("peak_memory_gib", ".1f"), " GiB"),
            "update skipped" if line.skipped else "",
            named("eta", line.show_eta()),
        ]
    )


def _pace_text(line: StepLine, rate_key: str, seconds_key: str) -> str:
    """'24.1k tok/s 19 s', as much of it as is known."""
    rate, seconds = line.show(rate_key, short), line.show(seconds_key, duration)
    return " ".join(part for part in (f"{rate} tok/s" if rate else "", seconds) if part)


def evaluation_line(metrics: Metrics) -> str:
    """'held-out avg@n 0.412 · pass@8 0.710', '' on steps without an evaluation."""
    average = number_of(metrics, "eval_avg_at_n")
    best = largest_pass_at_k(metrics.get("eval_pass_at_k"))
    return joined(
        [
            "" if average is None else f"held-out avg@n {average:.3f}",
            "" if best is None else f"pass@{best[0]} {best[1]:.3f}",
        ]
    )
