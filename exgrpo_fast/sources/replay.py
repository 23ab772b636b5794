"""ExGRPO's experience: recall the best of the past, and learn what to keep from each step.

arXiv 2510.02245, sections 3.2-3.3 and algorithms 1-2. Where the paper and the published code
differ, docs/exgrpo.md names the choice made here. Life of a question with s successes in its
latest group (a replayed trajectory counts as one):

    s = K        it retires: it leaves the store and the question stream for good
    0 < s < K    its fresh successes are stored (while replay is active), bucket s
    s = 0        nothing changes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np

from exgrpo_fast.buffer.selectors import draw_questions, lowest
from exgrpo_fast.buffer.store import Experience, ExperienceStore
from exgrpo_fast.experience import Group, Question, Trajectory
from exgrpo_fast.policy import Policy, Scores
from exgrpo_kernels import PolicyObjective

Select = Literal["entropy", "nll", "random"]


@dataclass(frozen=True)
class Recall:
    """What was recalled for one step, and what the choice looked like."""

    trajectories: tuple[Trajectory, ...] = ()
    num_candidates: int = 0
    candidate_entropy: float = 0.0  # mean over all candidates, to compare with the chosen ones

    @property
    def chosen_entropy(self) -> float:
        return (
            fmean(float(t.entropies.mean()) for t in self.trajectories)
            if self.trajectories
            else 0.0
        )


class ReplaySource:
    """At most floor(experience_ratio x prompts_per_step) replayed trajectories a step."""

    def __init__(
        self,
        store: ExperienceStore,
        policy: Policy,
        *,
        prompts_per_step: int,
        experience_ratio: float = 0.5,
        start_success_rate: float | None = 0.35,
        bucket_mean: float = 0.5,
        bucket_sigma: float = 0.125,
        select: Select = "entropy",
        shaping: float = 0.1,
        clip_fresh: bool = False,
        seed: int = 0,
    ) -> None:
        self.store = store
        self.policy = policy
        self.limit = int(experience_ratio * prompts_per_step)
        self.start_success_rate = start_success_rate
        self.bucket_mean = bucket_mean
        self.bucket_sigma = bucket_sigma
        self.select: Select = select
        self.shaping = shaping
        self.clip_fresh = clip_fresh
        self.active = start_success_rate is None  # latched: never switches back
        self.rng = np.random.default_rng([seed, 0x5E1EC7])

    def recall(self, questions: Mapping[str, Question], *, step: int) -> Recall:
        """One stored trajectory for each of the drawn questions, none while inactive."""
        count = min(self.limit, len(self.store)) if self.active else 0
        if count == 0:
            return Recall()
        drawn = draw_questions(
            self.store, count, mean=self.bucket_mean, sigma=self.bucket_sigma, rng=self.rng
        )
        candidates = [(questions[q], e) for q in drawn for e in self.store.experiences(q)]
        scores = self.policy.score(
            [question.prompt_ids for question, _ in candidates],
            [experience.token_ids.long().cpu() for _, experience in candidates],
        )
        chosen, start = [], 0
        for question_id in drawn:
            stop = start + len(self.store.experiences(question_id))
            best = start + self._choose(scores[start:stop])
            chosen.append(self._trajectory(*candidates[best], scores[best]))
            start = stop
        return Recall(
            trajectories=tuple(chosen),
            num_candidates=len(candidates),
            candidate_entropy=fmean(float(score.entropies.mean()) for score in scores),
        )

    def observe(self, groups: Sequence[Group]) -> list[str]:
        """Store, move and retire by the rule above; returns the questions retired now."""
        retired = []
        for group in groups:
            successes = group.num_successes
            if successes == len(group.trajectories):
                self.store.retire(group.question.id)
                retired.append(group.question.id)
            elif successes > 0 and self.active and not self.store.is_retired(group.question.id):
                self._collect(group)
                self.store.move(group.question.id, successes)
        return retired

    def start_if_ready(self, pass_at_1: float) -> None:
        """Latch replay on after a step whose share of correct responses is above the threshold."""
        if self.start_success_rate is not None and pass_at_1 > self.start_success_rate:
            self.active = True

    def objective(self, base: PolicyObjective) -> PolicyObjective:
        """Once active, fresh rows lose their clip too (published code; `clip_fresh` keeps it)."""
        if not self.active or self.clip_fresh:
            return base
        return replace(base, clip_low=None, clip_high=None, dual_clip=None)

    def metrics(self, recall: Recall, *, step: int) -> dict[str, Any]:
        """What is stored, and what was chosen in this step."""
        recalled = recall.trajectories
        return {
            "replay_active": int(self.active),
            "replay_size": len(self.store),
            "replay_trajectories": self.store.num_trajectories,
            "replay_bytes": self.store.num_bytes,
            "replay_buckets": list(self.store.bucket_sizes().values()),
            "retired_size": len(self.store.retired),
            "replay_candidates": recall.num_candidates,
            "replay_age_mean": fmean(step - t.birth_step for t in recalled) if recalled else None,
            "replay_entropy_selected": recall.chosen_entropy if recalled else None,
            "replay_entropy_candidates": recall.candidate_entropy if recalled else None,
        }

    def _collect(self, group: Group) -> None:
        for trajectory in group.from_source("fresh"):
            if trajectory.successful:
                self.store.add(
                    group.question.id,
                    trajectory.token_ids,
                    trajectory.behaviour_logprobs,
                    birth_step=trajectory.birth_step,
                    truncated=trajectory.truncated,
                )

    def _choose(self, scores: Sequence[Scores]) -> int:
        if self.select == "random":
            return int(self.rng.integers(len(scores)))
        if self.select == "nll":
            return lowest([-float(score.logprobs.mean()) for score in scores])
        return lowest([float(score.entropies.mean()) for score in scores])

    def _trajectory(self, question: Question, experience: Experience, now: Scores) -> Trajectory:
        return Trajectory(
            question=question,
            token_ids=experience.token_ids.long().cpu(),
            behaviour_logprobs=experience.behaviour_logprobs.cpu(),
            entropies=now.entropies,
            truncated=experience.truncated,
            source="replay",
            shaping=self.shaping,
            birth_step=experience.birth_step,
        )

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "rng": self.rng.bit_generator.state,
            "store": self.store.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.active = state["active"]
        self.rng.bit_generator.state = state["rng"]
        self.store.load_state_dict(state["store"])

    def questions(self) -> set[str]:
        """Ids of the stored questions."""
        return set(self.store.questions())


class NoReplay:
    """The on-policy run: nothing is recalled, kept or retired."""

    def questions(self) -> set[str]:
        return set()

    def recall(self, questions: Mapping[str, Question], *, step: int) -> Recall:
        return Recall()

    def observe(self, groups: Sequence[Group]) -> list[str]:
        return []

    def start_if_ready(self, pass_at_1: float) -> None:
        pass

    def objective(self, base: PolicyObjective) -> PolicyObjective:
        return base

    def metrics(self, recall: Recall, *, step: int) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
