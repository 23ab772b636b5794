"""The protocol every rollout engine obeys, and the seeds of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.types import Completion


@dataclass(frozen=True)
class Sampling:
    """How to sample; `temperature` 0 is greedy. Training keeps `top_p` at 1: a truncated
    distribution is not the policy whose ratio the loss takes."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    seed: int  # 64 bits; see `request_seed`
    max_completion_tokens: int | None = None  # below the sampling's limit; None: that limit


class Observer:
    """Callbacks during a generation; they must return quickly."""

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        """Some requests, by their places in the list, have their completions."""

    def on_poll(self) -> None:
        """Now and then, at least once for every few tokens."""


UNOBSERVED = Observer()


class EngineLost(UserError):
    """The engine died, hung or lost its connection; the run goes on from its last checkpoint."""


class Generation(Protocol):
    """Completions on their way."""

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """One completion per request, in order."""
        ...


class RolloutEngine(Protocol):
    def start(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        """Begin to generate, where the engine runs elsewhere; else `wait` does all of it."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        """One completion per request, in order. The process-wide random state is untouched."""
        ...

    def sync(self, version: int) -> dict[str, float]:
        """Take over the trainer's weights; `version` is the number of finished steps.

        Returns figures for the step's metrics.
        """
        ...

    def rest(self) -> None:
        """Training begins: an engine on the same GPU may have to make room until it is asked."""
        ...

    def close(self) -> None:
        """Give back memory, processes and sockets."""
        ...


@dataclass(frozen=True)
class LazyGeneration:
    """The generation of an engine that shares the trainer's process: it begins with `wait`."""

    engine: RolloutEngine
    requests: Sequence[Request]
    sampling: Sampling

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        return self.engine.generate(self.requests, self.sampling, observer)


class LocalEngine(RolloutEngine):
    """An engine in the trainer's process: everything happens in `generate`."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        return LazyGeneration(self, requests, sampling)

    def rest(self) -> None:
        """It keeps nothing between two generations."""

    def close(self) -> None:
        """Nothing to give back."""


class AsyncEngine(RolloutEngine):
    """An engine whose generations begin with `start`."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        return self.start(requests, sampling).wait(observer)


def request_seed(run_seed: int, step: int | str, question_id: str, sample: int) -> int:
    """One seed per request, a pure function of its place in the run: nothing to restore on resume.

    Different questions must not share seeds, or their samples become correlated.
    """
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{step}/{question_id}/{sample}".encode())
