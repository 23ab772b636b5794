"""Replay: ask questions again, bring back what solved them, and learn what to keep from each step.

A replay method is a `ReplayRecipe`: what is kept, which questions and trajectories are chosen, how
they enter their group (the mixer) and how they weigh. ExGRPO (arXiv 2510.02245, sections 3.2-3.3,
algorithms 1-2) is one of them; docs/replay.md lists all. Where the paper and the published code
differ, docs/exgrpo.md names the choice made here. Life of a question with s successes in its
latest group (a replayed trajectory counts as one):

    s = K        it retires: it leaves the store and the question stream for good
    0 < s < K    its fresh successes are stored (while replay is active), bucket s
    s = 0        nothing changes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.core.types import Group, Question, Trajectory, Verdict, pass_at_1
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.replay.protocol import Finished, ReplaySample, StepPlan
from exgrpo_fast.experience.replay.recipe import ReplayRecipe
from exgrpo_fast.experience.replay.selectors import (
    SCORED,
    TrajectoryKey,
    choose,
    max_variance_subset,
    stored_keys,
)
from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot, stored_rows
from exgrpo_fast.experience.replay.store import Experiences, ExperienceStore, rank_within
from exgrpo_fast.experience.replay.weighting import NEEDS_START, UNCLIPPED, weighted
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, Scores
from exgrpo_kernels import PolicyObjective


@dataclass(eq=False)
class ReplaySource:
    """Trajectories from the experience store."""

    store: ExperienceStore
    policy: Policy
    data: Sequence[Question]  # of the training, in the order that the store numbers them by
    stream: QuestionStream
    recipe: ReplayRecipe
    _: KW_ONLY
    prompts_per_step: int
    vocabulary: str = ""  # a fingerprint of the tokenizer; a snapshot of another one is refused
    seed: int = 0
    stopped: bool = field(default=False, init=False)
    next_group: int = field(default=0, init=False)
    # rows and entropies not yet noted
    _scored: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.place_of = {question.id: place for place, question in enumerate(self.data)}
        self.prompts = Ragged.of([question.prompt_ids for question in self.data])
        # latched: only `stop_after_steps` ends it
        self.active = self.recipe.start_success_rate is None
        self.rng = np.random.default_rng([self.seed, 0x5E1EC7])

    # --- before the rollout ---

    def prepare(self, step: int, begun: Mapping[str, Any] | None = None) -> StepPlan:
        """At most experience_ratio x prompts_per_step questions or whole groups come from the
        store, the stream brings the others."""
        groups: tuple[Group, ...] = ()
        if begun is not None:
            again, drawn = (tuple(self.stream.find(begun[part])) for part in ("planned", "drawn"))
        else:
            again, groups = self._from_store(step)
            taken = {question.id for question in again} | {group.question.id for group in groups}
            missing = self.prompts_per_step - len(again) - len(groups)
            drawn = tuple(self.stream.draw(missing, exclude=taken))
        counts, choose = self._slots(again, drawn, step=step)
        size, shares_slots = self.store.group_size, self.recipe.mixer == "replace_slot"
        num_fresh = tuple(size - count if shares_slots else size for count in counts)
        return StepPlan(step, again, drawn, num_fresh, groups, choose, self._replace_groups)

    def _from_store(self, step: int) -> tuple[tuple[Question, ...], tuple[Group, ...]]:
        """(questions to ask again, whole groups)."""
        limit = int(self.recipe.experience_ratio * self.prompts_per_step)
        if not self.active or limit == 0:
            return (), ()
        if self.recipe.mixer == "recent_groups":
            return (), tuple(self._draw_groups(limit, step=step, by_score=False))
        if self.recipe.questions is None:
            return (), ()
        drawn = self.recipe.questions(self.store, limit, self.rng, step)
        return tuple(self.data[place] for place in drawn), ()

    def _slots(
        self, again: Sequence[Question], drawn: Sequence[Question], *, step: int
    ) -> tuple[list[int], Callable[[], ReplaySample] | None]:
        """(how many stored trajectories each question gets, what chooses them).

        Questions that the stream drew get some only where the recipe leaves the choice of
        questions to the stream.
        """
        num_questions = len(again) + len(drawn)
        asked = again if self.recipe.questions else drawn
        if not self.active or not asked or self.recipe.mixer not in {"replace_slot", "append"}:
            return [0] * num_questions, None
        places = torch.tensor([self.place_of[q.id] for q in asked], device=self.store.device)
        rows, owner = self._candidates(places, step=step)
        counts = torch.bincount(owner, minlength=len(asked))
        if self.recipe.select != "all":
            counts = counts.clamp(max=self.recipe.count)
        before = 0 if self.recipe.questions else len(again)
        after = num_questions - before - len(asked)

        def choose_now() -> ReplaySample:
            found = ReplaySample(((),) * len(asked))
            if len(rows):
                found = self._choose(rows, owner, len(asked), step=step)
            return replace(found, slots=((),) * before + found.slots + ((),) * after)

        return [0] * before + counts.tolist() + [0] * after, choose_now

    def _choose(self, rows: Tensor, owner: Tensor, num_asked: int, *, step: int) -> ReplaySample:
        """The recipe's choice among the candidates of each question.

        Changes nothing: a step that is given up after it chooses the same again.
        """
        candidates = self.store.read(rows)
        scores, entropy = None, None
        if self.recipe.select in SCORED:
            scores = self._score(candidates)
            means = scores.per_completion(scores.entropies)
            self._scored = rows, means
            entropy = float(means.mean())
            chosen = choose(owner, score_keys(self.recipe.select, scores), self.recipe.count)
            scores = scores.pick(chosen.cpu())
        else:
            chosen = self._choose_unscored(candidates, owner, step=step)
        found: list[list[Trajectory]] = [[] for _ in range(num_asked)]
        trajectories = self._trajectories(candidates.pick(chosen.cpu()), scores)
        for number, trajectory in zip(owner[chosen].tolist(), trajectories, strict=True):
            found[number].append(trajectory)
        slots = tuple(tuple(of_one) for of_one in found)
        return ReplaySample(slots, num_candidates=len(rows), candidate_entropy=entropy)

    def _candidates(self, asked: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """(rows [C], owner [C]) of all that may be replayed for the asked questions."""
        recipe, stored = self.recipe, self.store.rows
        rows, owner = self.store.rows_of(asked)
        allowed = torch.ones_like(rows, dtype=torch.bool)
        if recipe.max_age is not None:
            allowed &= stored["birth_step"][rows] >= step - recipe.max_age
        if recipe.min_stored > 1:
            allowed &= torch.bincount(owner, minlength=len(asked))[owner] >= recipe.min_stored
        if recipe.prefilter is not None:
            allowed &= rank_within(owner, stored["entropy"][rows]) < recipe.prefilter
        return rows[allowed], owner[allowed]

    def _choose_unscored(self, candidates: Experiences, owner: Tensor, *, step: int) -> Tensor:
        recipe = self.recipe
        if recipe.select == "all":
            return torch.arange(len(candidates), device=owner.device)
        if recipe.select == "max_variance":
            rewards, owners = candidates.reward.cpu(), owner.cpu()
            places = [(owners == o).nonzero().flatten() for o in owners.unique()]
            picked = [
                of_one[max_variance_subset(rewards[of_one].tolist(), recipe.count)]
                for of_one in places
            ]
            return torch.cat(picked).to(owner.device)
        rng = np.random.default_rng([self.seed, 0xC005E, step])
        keys = stored_keys(recipe.select, candidates, rng)
        return choose(owner, keys, recipe.count)

    def _score(self, experiences: Experiences) -> Scores:
        prompts = self.prompts.pick(experiences.question.cpu())
        return self.policy.score(prompts, experiences.tokens)

    def _trajectories(self, chosen: Experiences, scores: Scores | None = None) -> list[Trajectory]:
        """The chosen experiences as trajectories, scored here where `scores` is None."""
        parts = self._now(chosen) if scores is None else scores.split()
        lengths = chosen.tokens.lengths
        tokens = Ragged(chosen.tokens.values.cpu(), lengths).split()
        behaviour = Ragged(chosen.logprobs.cpu(), lengths).split()
        places, births, rewards, truncated = (
            column.tolist()
            for column in (chosen.question, chosen.birth_step, chosen.reward, chosen.truncated)
        )
        return [
            weighted(
                Trajectory(
                    question=self.data[places[i]],
                    token_ids=tokens[i].long(),
                    behaviour_logprobs=behaviour[i],
                    entropies=entropies,
                    truncated=truncated[i],
                    source="replay",
                    birth_step=births[i],
                    verdict=Verdict(rewards[i], "stored"),
                ),
                self.recipe.weight,
                shaping=self.recipe.shaping,
                start_logprobs=logprobs,
            )
            for i, (logprobs, entropies) in enumerate(parts)
        ]

    def _now(self, chosen: Experiences) -> list[tuple[Tensor | None, Tensor]]:
        """(log-probs, entropies) of each under the present weights; mixer fifo, which draws too many to
        read them twice, has the stored mean entropy on every token and no log-probs."""
        if self.recipe.mixer != "fifo" or self.recipe.weight in NEEDS_START:
            return list(self._score(chosen).split())
        lengths, means = chosen.tokens.lengths.tolist(), chosen.entropy.tolist()
        return [(None, torch.full((n,), mean)) for n, mean in zip(lengths, means, strict=True)]

    # --- after the rewards ---

    def _replace_groups(self, groups: Sequence[Group]) -> list[Group]:
        """Groups without a gradient are replaced by stored ones, as many as there are."""
        groups = list(groups)
        if not self.active or self.recipe.mixer != "spent_groups":
            return groups
        spent = [i for i, group in enumerate(groups) if not group.learnable]
        for i, stored in zip(spent, self._draw_groups(len(spent), by_score=True), strict=False):
            groups[i] = stored
        return groups

    def _draw_groups(self, count: int, *, by_score: bool, step: int = 0) -> list[Group]:
        """Distinct stored groups, uniformly or in proportion to their score."""
        store = self.store.rows
        alive = store["question"] >= 0
        if self.recipe.max_age is not None:
            alive &= store["birth_step"] >= step - self.recipe.max_age
        ids, where = store["group"][alive].unique(return_inverse=True)
        if len(ids) == 0 or count == 0:
            return []
        scores = torch.zeros(len(ids), device=ids.device)
        scores[where] = store["score"][alive]
        weights = scores.double().cpu().numpy() if by_score else np.ones(len(ids))
        count = min(count, int((weights > 0).sum()))
        if count == 0:
            return []
        drawn = self.rng.choice(len(ids), size=count, replace=False, p=weights / weights.sum())
        chosen = ids[torch.from_numpy(drawn).to(ids.device)]
        rows = (alive & torch.isin(store["group"], chosen)).nonzero().flatten()
        rows = rows[store["serial"][rows].argsort()]
        experiences = self.store.read(rows)
        members: dict[int, list[Trajectory]] = {int(group): [] for group in chosen}
        trajectories = self._trajectories(experiences)
        for group, trajectory in zip(experiences.group.tolist(), trajectories, strict=True):
            members[group].append(trajectory)
        return [Group(found[0].question, tuple(found)) for found in members.values()]

    def _draw_singly(self, count: int, *, step: int) -> tuple[Group, ...]:
        """Distinct stored trajectories, uniformly, each as a separate group; fresh are those of `step`."""
        rows = stored_rows(self.store)
        if self.recipe.max_age is not None:
            rows = rows[self.store.rows["birth_step"][rows] >= step - self.recipe.max_age]
        drawn = self.rng.choice(len(rows), size=min(count, len(rows)), replace=False)
        chosen = self.store.read(rows[torch.from_numpy(drawn).to(rows.device)])
        return tuple(
            Group(t.question, (replace(t, source="fresh") if t.birth_step == step else t,), (a,))
            for t, a in zip(self._trajectories(chosen), chosen.advantage.tolist(), strict=True)
        )

    def finish(
        self, plan: StepPlan, groups: Sequence[Group], objective: PolicyObjective
    ) -> Finished:
        """A run that starts replay with this step samples from the next one on: objective and
        metrics are those before `maybe_activate`."""
        if self._scored is not None:  # before `update`, which may drop some of these rows
            self.store.note_entropy(*self._scored)
            self._scored = None
        self.stream.retire(self.update(groups, step=plan.step))
        trained = None
        if self.active and self.recipe.mixer == "fifo":
            fresh = sum(len(group.from_source("fresh")) for group in groups)
            trained = self._draw_singly(round(self.recipe.replay_ratio * fresh), step=plan.step)
        metrics = self.metrics(plan, groups if trained is None else trained)
        finished = Finished(self.objective(objective), metrics, trained)
        self.maybe_activate(pass_at_1(groups))
        return finished

    def update(self, groups: Sequence[Group], *, step: int) -> list[str]:
        """Store, move and retire by the rule above; returns the questions retired now.

        Groups taken whole from the store are no news, and neither a revision nor a prior-guided
        completion says how hard the question is for the policy alone.
        """
        groups = [without_guidance(group) for group in groups if not all(group.replayed)]
        retiring = [group for group in groups if self.recipe.retire and is_solved(group)]
        # Retiring works before replay is active, keeping does not.
        if retiring:
            self.store.retire(self._places(retiring))
        if self.active and groups:
            self._keep(groups, step)
            successes = torch.tensor([group.num_successes for group in groups])
            self.store.visit(self._places(groups), successes, step=step)
            moving = [(g, k) for g, k in zip(groups, self._buckets(groups), strict=True) if k >= 0]
            buckets = torch.tensor([bucket for _, bucket in moving])
            self.store.move(self._places([group for group, _ in moving]), buckets)
        if step == self.recipe.stop_after_steps:
            self.active, self.stopped = False, True
        return [group.question.id for group in retiring]

    def _buckets(self, groups: Sequence[Group]) -> list[int]:
        """The bucket that each group puts its question into; -1 = where it was."""
        size = self.store.group_size
        if self.recipe.difficulty == "reward_std":
            return reward_std_buckets([group.rewards for group in groups], size)
        # Groups of K + m trajectories count in K-ths. Without a success nothing moves; what is
        # solved, or has nothing kept, was put out above.
        return [
            min(max(round(g.num_successes * size / len(g.trajectories)), 1), size - 1)
            if 0 < g.num_successes < len(g.trajectories)
            else -1
            for g in groups
        ]

    def _keep(self, groups: Sequence[Group], step: int) -> None:
        kept = [
            (group, t, advantage)
            for group in groups
            for t, advantage in zip(group.trajectories, advantages_of(group), strict=True)
            if t.source == "fresh"
            and bool(t.behaviour_logprobs.isfinite().all())  # else the update refuses the batch
        ]
        if self.recipe.keep == "successes":
            kept = [row for row in kept if self._is_worth_keeping(*row[:2])]
        if self.recipe.keep == "none" or not kept:
            return
        number = {id(group): self.next_group + i for i, group in enumerate(groups)}
        self.next_group += len(groups)
        scores = {id(group): group_score(group.rewards) for group in groups}
        owners, trajectories, advantages = zip(*kept, strict=True)
        self.store.add(
            Experiences(
                question=self._places(owners),
                tokens=Ragged.of([t.token_ids for t in trajectories]),
                logprobs=torch.cat([t.behaviour_logprobs for t in trajectories]),
                birth_step=torch.tensor([t.birth_step for t in trajectories]),
                reward=torch.tensor([t.reward for t in trajectories]),
                success=torch.tensor([t.successful for t in trajectories]),
                truncated=torch.tensor([t.truncated for t in trajectories]),
                entropy=torch.stack([t.entropies.mean() for t in trajectories]),
                group=torch.tensor([number[id(group)] for group in owners]),
                score=torch.tensor([scores[id(group)] for group in owners]),
                advantage=torch.tensor(advantages),
            )
        )

    def _is_worth_keeping(self, group: Group, trajectory: Trajectory) -> bool:
        if self.recipe.difficulty == "reward_std":  # rewards without full marks
            return trajectory.reward >= fmean(group.rewards) and group.learnable
        return trajectory.successful and not is_solved(group)

    def _places(self, groups: Sequence[Group]) -> Tensor:
        places = [self.place_of[group.question.id] for group in groups]
        return torch.tensor(places, dtype=torch.int64)

    def maybe_activate(self, pass_at_1: float) -> None:
        """Latch replay on after a step whose pass@1 is above the threshold."""
        threshold = self.recipe.start_success_rate
        if threshold is not None and pass_at_1 > threshold and not self.stopped:
            self.active = True

    def objective(self, base: PolicyObjective) -> PolicyObjective:
        """Unclipped weights take the clip from fresh rows too, once active (ExGRPO's published
        code); `clip_fresh` keeps it there."""
        recipe = self.recipe
        replays = recipe.mixer != "question_only"
        if not self.active or recipe.clip_fresh or not (replays and recipe.weight in UNCLIPPED):
            return base
        return replace(base, clip_low=None, clip_high=None, dual_clip=None)

    # --- looking inside ---

    def metrics(self, plan: StepPlan, groups: Sequence[Group]) -> dict[str, Any]:
        """What is stored, and what was chosen in this step."""
        step, sample = plan.step, plan.sample
        replayed = [t for group in groups for t in group.from_source("replay")]
        ages = [step - t.birth_step for t in replayed]
        stored = step - self.store.rows["birth_step"][self.store.rows["question"] >= 0].cpu()
        sizes = self.store.bucket_sizes()
        every = self.recipe.difficulty == "reward_std"
        drawn_singly = self.active and self.recipe.mixer == "fifo"
        return {
            **({"replay_frac": len(replayed) / max(len(groups), 1)} if drawn_singly else {}),
            "replay_active": int(self.active),
            "replay_size": sum(sizes),
            "replay_trajectories": len(stored),
            "replay_bytes": self.store.num_bytes,
            "replay_evicted": self.store.num_evicted,
            "replay_buckets": sizes if every else sizes[1:-1],
            "replay_ages": age_histogram(stored),
            "retired_size": int(self.store.retired.sum()),
            "replay_candidates": sample.num_candidates,
            "replay_age_mean": fmean(ages) if ages else None,
            "replay_age_max": max(ages, default=None),
            "replay_entropy_selected": (
                fmean(float(t.entropies.mean()) for t in replayed) if replayed else None
            ),
            "replay_entropy_candidates": sample.candidate_entropy,
        }

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": self.active,
            "stopped": self.stopped,
            "next_group": self.next_group,
            "rng": self.rng.bit_generator.state,
            "store": snapshot(
                self.store, [question.id for question in self.data], vocabulary=self.vocabulary
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError in one line where the snapshot does not fit this run."""
        load_snapshot(self.store, state["store"], self.place_of, vocabulary=self.vocabulary)
        self.active, self.stopped = state["active"], state["stopped"]
        self.next_group = state["next_group"]
        self.rng.bit_generator.state = state["rng"]


# --- small mathematics ----------------------------------------------------------------------------


def without_guidance(group: Group) -> Group:
    """Without revisions and prior-guided completions."""
    own = [
        (t, advantage)
        for t, advantage in zip(group.trajectories, advantages_of(group), strict=True)
        if t.source in ("fresh", "replay")
    ]
    return Group(group.question, tuple(t for t, _ in own), tuple(a for _, a in own))


def advantages_of(group: Group) -> tuple[float, ...]:
    """Those of the group; 0 where none were computed."""
    return group.advantages or (0.0,) * len(group.trajectories)


def is_solved(group: Group) -> bool:
    return group.num_successes == len(group.trajectories)


def score_keys(by: TrajectoryKey, scores: Scores) -> Tensor:
    """float32 [C]: keys that need the present weights, smallest first (ExGRPO, section 3.2; the
    paper's other readings are options)."""
    if by == "nll":
        return -scores.per_completion(scores.logprobs)
    if by == "entropy_sum":
        return scores.per_completion(scores.entropies, "sum")
    means = scores.per_completion(scores.entropies)
    return -means if by == "highest_entropy" else means


def group_score(rewards: Sequence[float]) -> float:
    """sum |A| x std, by which TRL's replay buffer ranks groups; A is standardised there."""
    std, mean = pstdev(rewards), fmean(rewards)
    return sum(abs(reward - mean) for reward in rewards) if std > 0 else 0.0


def reward_std_buckets(rewards: Sequence[Sequence[float]], group_size: int) -> list[int]:
    """Difficulty of continuous rewards: their std in the group, stretched over the batch to 0..1,
    in K-ths (ExGRPO, section 5.3)."""
    stds = [pstdev(of_group) for of_group in rewards]
    low, high = min(stds), max(stds)
    return [round((std - low) / max(high - low, 1e-12) * group_size) for std in stds]


AGE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def age_histogram(ages: Tensor) -> list[int]:
    """Trajectories by age in steps: below 1, 2, 4, 8 .. 512, and above."""
    bins = torch.bucketize(ages, torch.tensor(AGE_BOUNDS), right=True)
    return torch.bincount(bins, minlength=len(AGE_BOUNDS) + 1).tolist()
