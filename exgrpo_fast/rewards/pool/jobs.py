"""What travels through a pool: samples, the jobs made of them, and a future with their verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from exgrpo_fast.core.types import RewardSample, Verdict
from exgrpo_fast.rewards.judgement import RewardError

# Reasons that speak of a broken reward rather than of a completion; the first one is a prefix.
FAULTS = ("error:", "timeout", "worker_died", "not_a_number", "missing_column")
# A reward that fails on such a share of the verdicts, of at least so many, is faulty.
NEARLY_ALL, ENOUGH = 0.95, 4


@dataclass(eq=False)
class Job:
    """The samples of one call: a distinct one, or all of a question where a reward is per group."""

    future: ScoreFuture
    samples: list[str]  # JSON: [prompt, completion, answer, columns]
    places: list[list[int]]  # for each sample, those in the future that its verdict fills
    scored: list[Verdict] | None = None
    crashes: int = 0  # workers that ended of their own accord while they had it

    @property
    def text(self) -> str:
        return f"[{', '.join(self.samples)}], {json.dumps(self.future.checking_gold)}"


@dataclass(eq=False)
class ScoreFuture:
    """Samples that were handed in, and their verdicts as they arrive."""

    checking_gold: bool = False
    verdicts: list[Verdict | None] = field(default_factory=list)  # in order; None: not known yet
    num_done: int = 0
    complete: bool = False  # no sample will be added
    unsent: list[tuple[int, RewardSample]] = field(default_factory=list)  # no jobs yet
    _jobs: list[Job] = field(default_factory=list)
    _job_of_text: dict[str, Job] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.num_done == len(self.verdicts)

    def add(self, samples: Sequence[RewardSample]) -> None:
        self.unsent += enumerate(samples, start=len(self.verdicts))
        self.verdicts += [None] * len(samples)

    def take_jobs(self, *, per_group: bool) -> list[Job]:
        """The jobs of what was added since the last call."""
        unsent, self.unsent = self.unsent, []
        return self._group_jobs(unsent) if per_group else self._single_jobs(unsent)

    def _single_jobs(self, unsent: Iterable[tuple[int, RewardSample]]) -> list[Job]:
        """Equal samples are one job: the K completions of an easy question are often the same."""
        new: list[Job] = []
        for place, sample in unsent:
            text = _as_json(sample)
            job = self._job_of_text.get(text)
            if job is None:
                job = self._job_of_text[text] = Job(self, [text], [[]])
                new.append(job)
            job.places[0].append(place)
            if job.scored is not None:
                self.verdicts[place] = job.scored[0]
                self.num_done += 1
        self._jobs += new
        return new

    def _group_jobs(self, unsent: Iterable[tuple[int, RewardSample]]) -> list[Job]:
        """One job for each question: its prompt and answer. Without a prompt nothing is known."""
        jobs: dict[Any, Job] = {}
        for place, sample in unsent:
            key = json.dumps([sample.prompt, sample.answer]) if sample.prompt else place
            job = jobs.setdefault(key, Job(self, [], []))
            job.samples.append(_as_json(sample))
            job.places.append([place])
        self._jobs += jobs.values()
        return list(jobs.values())

    def set_result(self, job: Job, scored: Sequence[Verdict]) -> None:
        """The verdicts of a job, one for each of its samples."""
        job.scored = list(scored)
        for places, of_sample in zip(job.places, job.scored, strict=True):
            for place in places:
                self.verdicts[place] = of_sample
            self.num_done += len(places)

    def cancel(self) -> None:
        """What is open becomes unscored."""
        cancelled = Verdict(0.0, "cancelled", scored=False)
        self.take_jobs(per_group=False)
        for job in self._jobs:
            if job.scored is None:
                self.set_result(job, [cancelled] * len(job.samples))


def _as_json(sample: RewardSample) -> str:
    return json.dumps([*sample[:3], dict(sample.columns)], default=str)


def refuse_failing_reward(verdicts: Sequence[Verdict], fault: str) -> None:
    """RewardError where nearly all verdicts are errors of the reward itself; `fault`: the last."""
    num_faults = sum(verdict.reason.startswith(FAULTS) for verdict in verdicts)
    if num_faults >= max(ENOUGH, NEARLY_ALL * len(verdicts)):
        raise RewardError(f"{num_faults} of {len(verdicts)} rewards are errors; {fault}")
