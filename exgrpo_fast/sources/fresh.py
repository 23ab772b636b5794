"""Fresh trajectories: the engine samples, the trainer's own weights give the behaviour log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exgrpo_fast.experience import Completion, Question, Trajectory
from exgrpo_fast.packing import Ragged
from exgrpo_fast.policy import Policy
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
    request_seed,
)


@dataclass(frozen=True)
class Mismatch:
    """|engine - trainer| log-probability per sampled token."""

    mean: float = 0.0
    max: float = 0.0


class FreshSource:
    """`sample` generates; `score` replaces the engine's log-probs by the trainer's."""

    def __init__(
        self, engine: RolloutEngine, policy: Policy, *, sampling: Sampling, seed: int
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.sampling = sampling
        self.seed = seed

    def sample(
        self,
        questions: Sequence[Question],
        counts: Sequence[int],
        *,
        step: int,
        observer: Observer = UNOBSERVED,
    ) -> list[list[Completion]]:
        """`counts[i]` completions of question i, in order."""
        requests = [
            Request(question.prompt_ids, request_seed(self.seed, step, question.id, sample))
            for question, count in zip(questions, counts, strict=True)
            for sample in range(count)
        ]
        completions = iter(self.engine.generate(requests, self.sampling, observer))
        return [[next(completions) for _ in range(count)] for count in counts]

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
            waiting=observer.waiting,
        ).split()
        trajectories = [
            Trajectory(
                question=question,
                token_ids=completion.token_ids,
                behaviour_logprobs=logprobs,
                entropies=entropies,
                truncated=completion.truncated,
                birth_step=step,
            )
            for question, completion, (logprobs, entropies) in zip(
                question_of, completions, scores, strict=True
            )
        ]
        gaps = [
            (logprobs - completion.logprobs).abs()
            for completion, (logprobs, _) in zip(completions, scores, strict=True)
        ]
        num_tokens = sum(len(gap) for gap in gaps)
        return trajectories, Mismatch(
            mean=sum(float(gap.sum()) for gap in gaps) / max(num_tokens, 1),
            max=max((float(gap.max()) for gap in gaps), default=0.0),
        )
