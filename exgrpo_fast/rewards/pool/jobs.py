"""What travels through a pool: samples, the jobs made of them, and tickets to collect verdicts by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple


class RewardSample(NamedTuple):
    """What one reward is asked about; `columns` are the other fields of the data row (JSON)."""

    prompt: str
    completion: str
    answer: str
    columns: Mapping[str, Any] = MappingProxyType({})


class Scored(NamedTuple):
    """A `Verdict` that needs no torch: same fields, same order."""

    reward: float
    reason: str = "ok"
    milliseconds: float = 0.0
    scored: bool = True
    checks: tuple[tuple[str, bool], ...] = ()


@dataclass(eq=False)
class Job:
    """One distinct sample of a ticket, and the places in the ticket that its verdict fills."""

    ticket: ScoreFuture
    text: str  # JSON: "prompt", "completion", "answer", {columns}, checking_gold
    places: list[int] = field(default_factory=list)
    scored: Scored | None = None
    deaths: int = 0  # workers that died of their own while they had it


class ScoreFuture:
    """Samples that were handed in, and their verdicts as they arrive."""

    def __init__(self) -> None:
        self.verdicts: list[Scored | None] = []  # in the order of the samples; None: not known yet
        self.num_done = 0
        self._jobs: dict[str, Job] = {}

    @property
    def done(self) -> bool:
        return self.num_done == len(self.verdicts)

    def add(self, samples: Sequence[RewardSample], *, checking_gold: bool = False) -> list[Job]:
        """Take more samples; return the jobs they make.

        Equal samples are one job: the K responses of an easy question are often the same.
        """
        new: list[Job] = []
        for sample in samples:
            text = json.dumps([*sample[:3], dict(sample.columns), checking_gold], default=str)[1:-1]
            job = self._jobs.get(text)
            if job is None:
                job = self._jobs[text] = Job(self, text)
                new.append(job)
            job.places.append(len(self.verdicts))
            self.verdicts.append(job.scored)
            self.num_done += job.scored is not None
        return new

    def settle(self, job: Job, scored: Scored) -> None:
        """The verdict of a job, for every sample that it stands for."""
        job.scored = scored
        for place in job.places:
            self.verdicts[place] = scored
        self.num_done += len(job.places)

    def cancel(self) -> None:
        """Settle what is open as unscored."""
        for job in self._jobs.values():
            if job.scored is None:
                self.settle(job, Scored(0.0, "cancelled", scored=False))
