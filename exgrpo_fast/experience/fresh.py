"""Fresh trajectories: the engine samples, the trainer's own weights give the behaviour log-probs.

An engine that draws with the trainer's weights in the trainer's dtype has computed them already. Then
a sample is scored in each step to show it, and the others keep the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace

from torch import Tensor

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

LogprobsAndEntropies = tuple[Tensor, Tensor]  # float32 [T] each
SAMPLE_EVERY = 16  # of the completions whose engine scores, one in so many is scored by the trainer
# Largest mean |difference| of a completion, in nats: ten times what float32 rounding makes of a
# language model with 30 layers.
SAMPLE_TOLERANCE = 3e-5


@dataclass(eq=False)
class FreshSource:
    """`start` generates; `score` replaces the engine's log-probs by the trainer's.

    What lies between the two is measured, and by `mismatch` corrected in the tokens' weights.
    `engine_scores`: the engine's log-probs and entropies are the policy's up to rounding.
    """

    engine: RolloutEngine
    policy: Policy
    _: KW_ONLY
    sampling: Sampling
    seed: int
    mismatch: MismatchRule = NO_CORRECTION
    engine_scores: InitVar[bool] = False

    def __post_init__(self, engine_scores: bool) -> None:
        assert not engine_scores or self.mismatch.correction == "none"
        self.sampling = replace(self.sampling, entropies=engine_scores)

    def start(
        self, questions: Sequence[Question], counts: Sequence[int], *, step: int
    ) -> Generation:
        """`counts[i]` completions of question i, on their way, one question after the other."""
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
        sample = self._sample(completions, step)
        scores = self._scores(question_of, completions, sample, observer)
        if len(sample) < len(completions) and not agree(completions, scores):
            sample = range(len(completions))
            scores = self._scores(question_of, completions, sample, observer)
        differences = {
            place: logprobs - completions[place].logprobs for place, (logprobs, _) in scores.items()
        }
        trajectories = [
            Trajectory(
                question=question,
                token_ids=completion.token_ids,
                behaviour_logprobs=logprobs,
                entropies=entropies,
                truncated=completion.truncated,
                kept=completion.kept,
                token_weights=(
                    self.mismatch.factors(differences[place]) if place in differences else None
                ),
                birth_step=step,
            )
            for place, (question, completion) in enumerate(
                zip(question_of, completions, strict=True)
            )
            for logprobs, entropies in [scores.get(place) or scores_of(completion)]
        ]
        scored = [completions[place] for place in differences]
        found = measure(list(differences.values()), scored, self.mismatch, version=step - 1)
        share = len(scored) / len(completions) if completions else 1.0
        return trajectories, replace(found, scored_frac=share)

    def _sample(self, completions: Sequence[Completion], step: int) -> Sequence[int]:
        """Places of the completions that the policy scores, another sample in each step."""
        if any(completion.entropies is None for completion in completions):
            return range(len(completions))
        count = min(SAMPLE_EVERY, len(completions))
        return range(step % max(count, 1), len(completions), SAMPLE_EVERY)

    def _scores(
        self,
        question_of: Sequence[Question],
        completions: Sequence[Completion],
        places: Sequence[int],
        observer: Observer,
    ) -> dict[int, LogprobsAndEntropies]:
        """Of the completions at `places`, under the policy."""
        chosen = [completions[place] for place in places]
        scores = self.policy.score(
            Ragged.of([question_of[place].prompt_ids for place in places]),
            Ragged.of([completion.token_ids for completion in chosen]),
            kept=kept_sets(chosen),
            on_poll=observer.on_poll,
        ).split()
        return dict(zip(places, scores, strict=True))


def scores_of(completion: Completion) -> LogprobsAndEntropies:
    """The engine's own."""
    assert completion.entropies is not None
    return completion.logprobs, completion.entropies


def agree(completions: Sequence[Completion], scores: Mapping[int, LogprobsAndEntropies]) -> bool:
    """Whether the engine's log-probs and entropies are these, up to rounding. NaN agrees with nothing."""
    return all(
        float((ours - theirs).abs().mean()) <= SAMPLE_TOLERANCE
        for place, of_policy in scores.items()
        for ours, theirs in zip(of_policy, scores_of(completions[place]), strict=True)
    )
