"""The output of a run: a live screen on a terminal (`live.py`), plain lines elsewhere (`plain.py`).

A line begins with what shows whether the policy learns (reward, pass@1, learnable share, entropy) and
how fast (tokens per second). The loss is left out: the value of a policy gradient's loss means
little, and 0.0000 looks like a broken run. It is in metrics.jsonl.

Every text passes `clean_text`: a policy may write control characters, which a terminal executes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from exgrpo_fast.core.types import Metrics

Advance = Callable[..., None]  # advance(count=1)
Row = Mapping[str, Any]  # one trajectory, named as in the completion tables


class Screen:
    """Where the trainer reports phases, steps and completions to its user; this one shows nothing."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A long piece of work; the block calls `advance(count=1)` as it proceeds."""
        yield lambda count=1: None

    def step(self, metrics: Metrics, *, total_steps: int) -> None:
        """The metrics of a finished step."""

    def completions(self, rows: Sequence[Row]) -> None:
        """The trajectories of one group: shows the best and the worst."""

    def note(self, text: str) -> None:
        """One message that stays on the screen."""

    def close(self) -> None:
        pass
