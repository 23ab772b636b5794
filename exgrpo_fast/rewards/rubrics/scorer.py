"""Rubrics of both kinds in one verdict: Python's checks in the pool first, then the judge's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from exgrpo_fast.core.types import RewardSample, Verdict
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.pool.pool import RewardPool
from exgrpo_fast.rewards.rubrics.rubrics import JudgeRequest, RubricText, summarise

if TYPE_CHECKING:  # it needs an HTTP client
    from exgrpo_fast.rewards.rubrics.judge import Judge


class RubricScorer:
    """A reward pool with a judge behind it, for a set of rubrics some of which have no check.

    pool: holds the one rubric set and nothing else, with weight 1.
    judge: None where every rubric has a check.
    A completion that the judge cannot decide is not scored. One that the pool could not check (a
    timeout, say) has the pool's verdict, and the judge is not asked.
    """

    def __init__(self, pool: RewardPool, judge: Judge | None = None) -> None:
        if len(pool.functions) != 1:
            raise RewardError(
                f"a judge goes with one set of rubrics, but there are {len(pool.functions)} rewards"
            )
        self.pool = pool
        self._judge = judge

    def refuse_faults(self, verdicts: Sequence[Verdict]) -> None:
        self.pool.refuse_faults(verdicts)

    @property
    def rubrics(self) -> dict[str, RubricText]:
        """By name; known after the first call."""
        return self.pool.rubrics

    def check(self, *samples: RewardSample) -> None:
        """Try the checks, and the judge where it is needed; one line where one of them fails.

        RewardError of the pool, JudgeError of the judge.
        """
        self.pool.check(*samples)
        if any(text.judged for text in self.rubrics.values()):
            self._needed_judge().check()

    def score(
        self,
        samples: Sequence[RewardSample],
        on_finished: Callable[[int], object] = lambda count: None,
    ) -> list[Verdict]:
        """One verdict per sample, in order; `on_finished(count)` after the pool and the judge."""
        scored = self.pool.score(samples)
        asked = [self._unchecked(*pair) for pair in zip(samples, scored, strict=True)]
        places = [place for place, names in enumerate(asked) if names]
        on_finished(len(samples) - len(places))
        requests = [self._request(samples[place], asked[place]) for place in places]
        answers = self._needed_judge().judge(requests) if requests else []
        for place, answer in zip(places, answers, strict=True):
            scored[place] = self._join(scored[place], asked[place], answer)
        on_finished(len(places))
        return scored

    def _unchecked(self, sample: RewardSample, scored: Verdict) -> list[str]:
        """The rubrics that the judge has to decide; none where the pool has failed."""
        applying = {n: text for n, text in self.rubrics.items() if text.applies(sample.columns)}
        judged = [name for name, text in applying.items() if text.judged]
        complete = len(scored.checks) == len(applying) - len(judged)
        return judged if complete else []

    def _request(self, sample: RewardSample, names: Sequence[str]) -> JudgeRequest:
        texts = [self.rubrics[name] for name in names]
        return JudgeRequest(
            sample.prompt, sample.completion, tuple((t.public_text, t.weight) for t in texts)
        )

    def _needed_judge(self) -> Judge:
        if self._judge is None:
            judged = ", ".join(name for name, text in self.rubrics.items() if text.judged)
            raise RewardError(f"rubrics without a check, and no judge to decide them: {judged}")
        return self._judge

    def _join(self, scored: Verdict, names: Sequence[str], answer: list[bool] | None) -> Verdict:
        """The pool's checks and the judge's answer -> one verdict, in the order of the rubrics."""
        if answer is None:
            return scored._replace(reward=0.0, reason="unscored", scored=False)
        met = dict(scored.checks) | dict(zip(names, answer, strict=True))
        checks = tuple((name, met[name]) for name in self.rubrics if name in met)
        reward, reason = summarise(self.rubrics, checks)
        if scored.reason.startswith("error:"):  # a check that failed is worth more words
            reason = scored.reason
        correct = all(met for name, met in checks if self.rubrics[name].weight)
        return Verdict(reward, reason, scored.milliseconds, checks=checks, correct=correct)
