"""The prior: for each question some completions in which a frozen policy re-draws critical tokens.

EAPO (arXiv 2606.30420), section 3.3 and algorithm 1. For its first T steps a run gives one of the K
slots of every group to a completion that is drafted by the policy and corrected by the prior
(`exgrpo_fast/experience/prior`). Its reward counts in the group's statistics like any other; it is
trained only where it is correct, and weighs by its importance mode. After T steps all K are fresh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.types import Question, Trajectory
from exgrpo_fast.experience.prior.driver import GuidedCompletion, Resampler, Session
from exgrpo_fast.experience.prior.guidance_metrics import GuidanceCost
from exgrpo_fast.experience.prior.importance import (
    NEEDS_LAW,
    Importance,
    balance_weight,
    columns_of,
)
from exgrpo_fast.experience.prior.mixture import MixtureLogprobs, mixture_logprobs
from exgrpo_fast.experience.prior.protocols import Prior
from exgrpo_fast.model.packing import Ragged, sequences_of
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, request_seed

Annealing = Literal["hard", "linear"]


@dataclass(frozen=True)
class PriorRecipe:
    """The parts of the method. The defaults are EAPO's.

    `annealing`: "hard" guides every group up to `stop_after_steps` and none behind it, "linear" a
    share of the groups that falls from 1 to 0 until then.
    """

    augmented_per_group: int = 1
    stop_after_steps: int | None = 60
    annealing: Annealing = "hard"
    positive_only: bool = True
    importance: Importance = "sis_token"
    weight_cap: float = 3.0  # of the exact importance modes


@dataclass(frozen=True)
class Guided:
    """The guided completions of one call, while they are generated."""

    question_of: Sequence[Question]
    sessions: Sequence[Session]

    def advance(self) -> None:
        """As far as it goes without waiting, for engines that work beside the fresh completions."""
        next((s for s in self.sessions if s.advance()), None)

    def finish(self) -> list[GuidedCompletion]:
        return [completion for session in self.sessions for completion in session.finish()]


@dataclass(eq=False)
class PriorSource(Prior):
    """Guided completions, from their drafts to trajectories with the columns of their mode.

    `prior` with its `num_tokens` ids: needed where the importance mode needs the exact law.
    `max_batch_sequences`: completions guided side by side.
    """

    resampler: Resampler
    policy: Policy
    recipe: PriorRecipe
    _: KW_ONLY
    prior: Policy | None = None
    num_tokens: int = 0
    max_batch_sequences: int = 256
    seed: int = 0

    # --- before the rollout ---

    def counts(self, num_questions: int, *, step: int) -> list[int]:
        """Guided slots of each question, a pure function of the step: nothing is saved."""
        recipe, last = self.recipe, self.recipe.stop_after_steps
        if last is not None and step > last:
            return [0] * num_questions
        guided = np.ones(num_questions, dtype=bool)
        if recipe.annealing == "linear" and last is not None:
            rng = np.random.default_rng([self.seed, step, 0xEA])
            guided = rng.random(num_questions) < 1 - (step - 1) / last
        return [recipe.augmented_per_group * int(g) for g in guided]

    def begin(self, questions: Sequence[Question], counts: Sequence[int], *, step: int) -> Guided:
        pairs = [
            (q, Request(q.prompt_ids, request_seed(self.seed, f"{step}/prior", q.id, sample)))
            for q, count in zip(questions, counts, strict=True)
            for sample in range(count)
        ]
        requests = [request for _, request in pairs]
        size = self.max_batch_sequences
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        sessions = [self.resampler.start(batch) for batch in batches]
        return Guided([question for question, _ in pairs], sessions)

    @property
    def concurrent(self) -> bool:
        return self.resampler.drafter.concurrent

    # --- after it ---

    def score(
        self, guided: Guided, fresh: Sequence[Trajectory], *, step: int
    ) -> tuple[list[Trajectory], list[Trajectory], GuidanceCost]:
        """(guided trajectories, the fresh ones, what it took). The fresh ones change only under
        importance `mis`, which weighs every completion of a group."""
        completions, questions = guided.finish(), guided.question_of
        if not completions:
            return [], list(fresh), GuidanceCost()
        cost = self._cost(guided, completions, fresh)
        found = [self._trajectory(*pair, step) for pair in zip(questions, completions, strict=True)]
        scored = self._scored(found)
        if self.recipe.importance not in NEEDS_LAW:
            return [self._weighed(t) for t in scored], list(fresh), cost
        law = self._law(scored)
        cost = replace(cost, rates=float(law.rates.values.sum()), rate_tokens=cost.tokens)
        if self.recipe.importance == "mis":
            return *self._balanced(scored, law.mu, fresh), cost
        mus = law.mu.split()
        return [self._weighed(t, mu) for t, mu in zip(scored, mus, strict=True)], list(fresh), cost

    def mask_failed(self, trajectory: Trajectory) -> Trajectory:
        """The positive filter: what failed stays in the baseline and leaves the loss."""
        failed = trajectory.source == "prior" and not trajectory.successful
        if failed and self.recipe.positive_only:
            return replace(trajectory, masked=True)
        return trajectory

    def _trajectory(self, question: Question, guided: GuidedCompletion, step: int) -> Trajectory:
        completion = guided.completion()
        return Trajectory(
            question=question,
            token_ids=completion.token_ids,
            behaviour_logprobs=completion.logprobs,
            entropies=torch.empty(0),
            truncated=completion.truncated,
            source="prior",
            birth_step=step,
            guidance=guided.guidance(),
        )

    def _scored(self, found: Sequence[Trajectory]) -> list[Trajectory]:
        """By the trainer's weights: the engine has no log-probs of tokens that it did not draw."""
        scores = self.policy.score(*sequences_of(found)).split()
        return [
            replace(t, behaviour_logprobs=old, entropies=entropies)
            for t, (old, entropies) in zip(found, scores, strict=True)
        ]

    def _weighed(self, trajectory: Trajectory, mu_T: Tensor | None = None) -> Trajectory:
        assert trajectory.guidance is not None
        columns = columns_of(
            self.recipe.importance,
            old_T=trajectory.behaviour_logprobs,
            prior_T=trajectory.guidance.prior_logprobs,
            redrawn_T=trajectory.guidance.redrawn,
            mu_T=mu_T,
            cap=self.recipe.weight_cap,
        )
        found = replace(trajectory, behaviour_logprobs=columns.behaviour_logprobs)
        return found if columns.token_weights is None else reweighted(found, columns.token_weights)

    def _law(self, trajectories: Sequence[Trajectory]) -> MixtureLogprobs:
        assert self.prior is not None
        return mixture_logprobs(
            self.policy,
            self.prior,
            self.resampler.trigger,
            *sequences_of(trajectories),
            num_tokens=self.num_tokens,
        )

    def _balanced(
        self, guided: Sequence[Trajectory], mu: Ragged, fresh: Sequence[Trajectory]
    ) -> tuple[list[Trajectory], list[Trajectory]]:
        """Every completion of a group with a guided one, by the balance heuristic."""
        num_guided = Counter(t.question.id for t in guided)
        size = num_guided + Counter(t.question.id for t in fresh)
        beside = [t for t in fresh if num_guided[t.question.id]]
        mus = [*mu.split(), *(self._law(beside).mu.split() if beside else ())]
        weighed = {}
        for t, mu_T in zip([*guided, *beside], mus, strict=True):
            weight = balance_weight(
                (mu_T - t.behaviour_logprobs).sum(),
                group_size=size[t.question.id],
                num_guided=num_guided[t.question.id],
            )
            weighed[id(t)] = reweighted(t, weight.expand(t.num_tokens))
        return [weighed[id(t)] for t in guided], [weighed.get(id(t), t) for t in fresh]

    def _cost(
        self, guided: Guided, completions: Sequence[GuidedCompletion], fresh: Sequence[Trajectory]
    ) -> GuidanceCost:
        """With KL(pi || r) of one fresh completion a question: a few per cent of the tokens."""
        seconds = [session.seconds for session in guided.sessions]
        firsts = list({t.question.id: t for t in fresh}.values())
        scorer = self.resampler.scorer
        prior = scorer.whole_completions(
            [t.question.prompt_ids for t in firsts], [t.token_ids for t in firsts]
        )
        gaps = [t.behaviour_logprobs - r for t, r in zip(firsts, prior, strict=True)]
        return GuidanceCost(
            rounds=sum(completion.rounds for completion in completions),
            drafted=sum(completion.drafted for completion in completions),
            tokens=sum(len(completion.token_ids) for completion in completions),
            seconds_draft=sum(s["draft"] for s in seconds),
            seconds_score=sum(s["score"] for s in seconds),
            seconds_draw=sum(s["draw"] for s in seconds),
            divergence=sum(float(gap.sum()) for gap in gaps),
            divergence_tokens=sum(len(gap) for gap in gaps),
        )


def reweighted(trajectory: Trajectory, factors_T: Tensor) -> Trajectory:
    """Weights its tokens and its share of the baseline alike: the reward of a completion that hardly
    weighs must not lower the advantages of the others (docs/eapo.md)."""
    before = trajectory.token_weights
    return replace(
        trajectory,
        token_weights=factors_T if before is None else before * factors_T,
        baseline_weight=float(factors_T.mean()),
    )
