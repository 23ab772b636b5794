"""The protocol every rollout engine obeys, and the seeds of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from exgrpo_fast.experience import Completion


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


class Observer:
    """Is told of a generation while it goes on; what it does must be brief."""

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        """Some requests, by their places in the list, have their completions."""

    def waiting(self) -> None:
        """Now and then, at least once for every few tokens."""


UNOBSERVED = Observer()


class RolloutEngine(Protocol):
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        """One completion per request, in order. The process-wide random state is untouched."""
        ...

    def sync(self, version: int) -> None:
        """Take over the trainer's weights; `version` is the number of finished steps."""
        ...


def request_seed(run_seed: int, step: int | str, question_id: str, sample: int) -> int:
    """One seed per request, a pure function of its place in the run: nothing to restore on resume.

    Different questions must not share seeds, or their samples become correlated.
    """
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{step}/{question_id}/{sample}".encode())
