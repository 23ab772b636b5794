"""avg@n and pass@k on held-out questions, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import numpy as np

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.types import Completion, Question, Verdict
from exgrpo_fast.experience.hindsight.source import HindsightPrompt
from exgrpo_fast.experience.scoring import StreamingScorer, Verifier
from exgrpo_fast.rollout.engine import Request, RolloutEngine, Sampling, request_seed
from exgrpo_fast.run.display import Screen


@dataclass(frozen=True)
class Example:
    """The first completion of a held-out question, to look at."""

    question: str
    completion: str
    reward: float


@dataclass(frozen=True)
class Evaluation:
    """Averages over questions; `*_low`, `*_high` are 95 % bootstrap bounds of avg@n."""

    avg_at_n: float
    avg_at_n_low: float
    avg_at_n_high: float
    pass_at_k: dict[str, float]  # k as text, as in JSON
    n: int
    questions: int
    truncated: float  # share of completions cut by the length limit
    completion_len_mean: float
    avg_at_n_revised: list[float] = field(default_factory=list)  # after each round of revision
    examples: list[Example] = field(default_factory=list)  # of the first questions

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One scored completion, for `exgrpo-fast sample` and for the completion tables."""

    question: Question
    completion: Completion
    text: str
    verdict: Verdict


@dataclass(eq=False)
class Evaluator:
    """Samples n completions of every question and scores them with the training rewards.

    The same `seed` gives the same random numbers before and after training. `revisions`: rounds in
    which failed completions are revised; `prompt` shows the verdict.
    """

    engine: RolloutEngine
    verifier: Verifier
    screen: Screen
    _: KW_ONLY
    sampling: Sampling
    n: int
    ks: Sequence[int]
    seed: int
    revisions: int = 0
    prompt: HindsightPrompt | None = None
    num_examples: int = 0

    def __call__(
        self, questions: Sequence[Question], on_poll: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """`on_poll` is called while completions are generated, and may raise."""
        with HEARTBEAT.phase("evaluate"):
            samples = self.sample(questions, on_poll)
            revised = self._revised(samples)
        successes = self._successes(samples)
        low, high = bootstrap_interval(successes / self.n, seed=self.seed)
        return Evaluation(
            avg_at_n=float(successes.mean() / self.n),
            avg_at_n_low=low,
            avg_at_n_high=high,
            pass_at_k={str(k): mean_pass_at_k(successes.tolist(), self.n, k) for k in self.ks},
            n=self.n,
            questions=len(questions),
            truncated=float(np.mean([s.completion.truncated for s in samples])),
            completion_len_mean=float(np.mean([len(s.completion.token_ids) for s in samples])),
            avg_at_n_revised=revised,
            examples=[
                Example(str(s.question.conversation[-1]["content"]), s.text, s.verdict.reward)
                for s in samples[: self.n * self.num_examples : self.n]
            ],
        )

    def _successes(self, samples: Sequence[Sample]) -> np.ndarray:
        """Correct completions of each question; unscored ones count as incorrect."""
        correct = [s.verdict.successful for s in samples]
        return np.array(correct).reshape(-1, self.n).sum(axis=1)

    def _revised(self, samples: Sequence[Sample]) -> list[float]:
        """avg@n after each round of revision; correct completions are left alone."""
        averages, samples = [], list(samples)
        for number in range(1, self.revisions + 1):
            samples = self._revise(samples, number)
            averages.append(float(self._successes(samples).mean() / self.n))
        return averages

    def _revise(self, samples: list[Sample], number: int) -> list[Sample]:
        assert self.prompt is not None
        asked: dict[int, Question] = {}
        for i, sample in enumerate(samples):
            if sample.verdict.successful:
                continue
            if question := self.prompt.ask(
                sample.question, sample.text, sample.verdict, revision=number
            ):
                asked[i] = question
        requests = [
            Request(question.prompt_ids, request_seed(self.seed, "revise", question.id, i % self.n))
            for i, question in asked.items()
        ]
        if not requests:
            return samples
        originals = [samples[i].question for i in asked]
        drafts = [samples[i].text for i in asked]
        with self.screen.phase("revise", len(requests)) as advance:
            grading = StreamingScorer(self.verifier, originals, advance, drafts=drafts)
            completions = self.engine.generate(requests, self.sampling, grading)
        revised = self._samples(originals, completions, grading.verdicts())
        by_place = dict(zip(asked, revised, strict=True))
        return [by_place.get(i, sample) for i, sample in enumerate(samples)]

    def sample(
        self, questions: Sequence[Question], on_poll: Callable[[], None] = lambda: None
    ) -> list[Sample]:
        """n scored completions of each question, question by question."""
        asked = [question for question in questions for _ in range(self.n)]
        requests = [
            Request(q.prompt_ids, request_seed(self.seed, "eval", q.id, i % self.n))
            for i, q in enumerate(asked)
        ]
        with self.screen.phase("evaluate", len(requests)) as advance:
            grading = StreamingScorer(self.verifier, asked, advance, beside=on_poll)
            completions = self.engine.generate(requests, self.sampling, grading)
        return self._samples(asked, completions, grading.verdicts())

    def _samples(
        self,
        asked: Sequence[Question],
        completions: Sequence[Completion],
        verdicts: Sequence[Verdict],
    ) -> list[Sample]:
        texts = [self.verifier.decode(completion.token_ids.tolist()) for completion in completions]
        return [Sample(*row) for row in zip(asked, completions, texts, verdicts, strict=True)]


def mean_pass_at_k(successes: Sequence[int], n: int, k: int) -> float:
    """Unbiased: mean of 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return sum(1.0 - math.comb(n - c, k) / math.comb(n, k) for c in successes) / len(successes)


def bootstrap_interval(
    per_question: np.ndarray, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling questions."""
    rng = np.random.default_rng([seed, resamples])
    picks = rng.integers(len(per_question), size=(resamples, len(per_question)))
    low, high = np.quantile(per_question[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
