"""The protocol of rollout engines, and the seeds of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.types import Completion


@dataclass(frozen=True)
class Sampling:
    """How to sample; `temperature` 0 is greedy. `top_k` 0 is the whole vocabulary.

    With `top_k` a completion says what each token was drawn from (`Completion.kept`): training needs
    it, because the log-probs of its loss have to be over the same tokens.
    `entropies`: completions bring them, where the engine can (`Completion.entropies`).
    """

    max_completion_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    entropies: bool = False


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    seed: int  # 64 bits; see `request_seed`
    max_completion_tokens: int | None = None  # below the sampling's limit; None: that limit

    def limit(self, sampling: Sampling) -> int:
        return self.max_completion_tokens or sampling.max_completion_tokens


class Observer:
    """Callbacks during a generation; they must return quickly."""

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        """Some requests, by their places in the list, have their completions."""

    def on_poll(self) -> None:
        """Now and then, at least once for every few tokens."""


UNOBSERVED = Observer()


class EngineLost(UserError):
    """The engine died, hung or lost its connection; the last checkpoint can be resumed."""


class EngineRefused(EngineLost):
    """The engine answers, and will not do what it is asked."""


class Generation(Protocol):
    """Completions on their way."""

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """One completion per request, in order."""
        ...


class RolloutEngine:
    """The interface of engines; as it stands, of one whose generations begin in another process."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        """Begin to generate in an engine of another process; in this one `wait` does all of it."""
        raise NotImplementedError

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        """One completion per request, in order. The process-wide random state is untouched."""
        return self.start(requests, sampling).wait(observer)

    def sync(self, version: int) -> dict[str, float]:
        """Load the trainer's weights; `version` is the number of finished steps.

        Returns metrics of the step.
        """
        raise NotImplementedError

    def on_update_start(self) -> None:
        """An engine on the same GPU may free memory until the next generation."""

    def close(self) -> None:
        """Free memory, end processes, close sockets."""


@dataclass(frozen=True)
class LazyGeneration:
    """The generation of an engine that shares the trainer's process: it begins with `wait`."""

    engine: RolloutEngine
    requests: Sequence[Request]
    sampling: Sampling

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        return self.engine.generate(self.requests, self.sampling, observer)


class LocalEngine(RolloutEngine):
    """An engine in the trainer's process, which overrides `generate`."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        return LazyGeneration(self, requests, sampling)


class EngineWrapper(RolloutEngine):
    """Base of engines that add something to another one, to which they forward every call."""

    engine: RolloutEngine

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        return self.engine.start(requests, sampling)

    def sync(self, version: int) -> dict[str, float]:
        return self.engine.sync(version)

    def on_update_start(self) -> None:
        self.engine.on_update_start()

    def close(self) -> None:
        self.engine.close()


def request_seed(run_seed: int, step: int | str, question_id: str, sample: int) -> int:
    """One seed per request, a pure function of its place in the run: nothing to restore on resume.

    Different questions must not share seeds, or their samples become correlated.
    """
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{step}/{question_id}/{sample}".encode())
