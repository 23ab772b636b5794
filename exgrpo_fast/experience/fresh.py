"""Fresh trajectories: the engine samples, the trainer's own weights give the behaviour log-probs."""

from __future__ import annotations

from collections.abc import Sequence

from exgrpo_fast.core.types import Completion, Question, Trajectory
from exgrpo_fast.model.packing import Ragged, kept_sets
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    Generation,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
    request_seed,
)
from exgrpo_fast.rollout.mismatch import NO_CORRECTION, Mismatch, MismatchRule, measure


class FreshSource:
    """`sample` generates; `score` replaces the engine's log-probs by the trainer's.

    What lies between the two is measured, and by `mismatch` corrected in the tokens' weights.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        *,
        sampling: Sampling,
        seed: int,
        mismatch: MismatchRule = NO_CORRECTION,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.sampling = sampling
        self.seed = seed
        self.mismatch = mismatch

    def sample(
        self,
        questions: Sequence[Question],
        counts: Sequence[int],
        *,
        step: int,
        observer: Observer = UNOBSERVED,
    ) -> list[list[Completion]]:
        """`counts[i]` completions of question i, in order."""
        generation = self.start(questions, counts, step=step)
        return by_question(generation.wait(observer), counts)

    def start(
        self, questions: Sequence[Question], counts: Sequence[int], *, step: int
    ) -> Generation:
        """The same, on its way: one completion after the other, to be parted by `by_question`."""
        requests = [
            Request(question.prompt_ids, request_seed(self.seed, step, question.id, sample))
            for question, count in zip(questions, counts, strict=True)
            for sample in range(count)
        ]
        return self.engine.start(requests, self.sampling)

    def score(
        self,
        question_of: Sequence[Question],
        completions: Sequence[Completion],
        *,
        step: int,
        observer: Observer = UNOBSERVED,
    ) -> tuple[list[Trajectory], Mismatch]:
        """Behaviour log-probs and entropies under the weights of the start of the step."""
        scores = self.policy.score(
            Ragged.of([question.prompt_ids for question in question_of]),
            Ragged.of([completion.token_ids for completion in completions]),
            kept=kept_sets(completions),
            on_poll=observer.on_poll,
        ).split()
        differences = [
            logprobs - completion.logprobs
            for completion, (logprobs, _) in zip(completions, scores, strict=True)
        ]
        trajectories = [
            Trajectory(
                question=question,
                token_ids=completion.token_ids,
                behaviour_logprobs=logprobs,
                entropies=entropies,
                truncated=completion.truncated,
                kept=completion.kept,
                token_weights=self.mismatch.factors(difference),
                birth_step=step,
            )
            for question, completion, (logprobs, entropies), difference in zip(
                question_of, completions, scores, differences, strict=True
            )
        ]
        return trajectories, measure(differences, completions, self.mismatch, version=step - 1)


def by_question(completions: Sequence[Completion], counts: Sequence[int]) -> list[list[Completion]]:
    following = iter(completions)
    return [[next(following) for _ in range(count)] for count in counts]
