"""The parts of a replay method, as one value: a new method is another choice of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exgrpo_fast.experience.replay.selectors import (
    QuestionSelector,
    TrajectoryKey,
    gaussian_buckets,
)
from exgrpo_fast.experience.replay.weighting import Weight

Keep = Literal["successes", "all", "none"]
Mixer = Literal[
    "replace_slot", "append", "question_only", "recent_groups", "spent_groups", "fifo"
]  # fmt: skip
Difficulty = Literal["successes", "reward_std"]


@dataclass(frozen=True)
class ReplayRecipe:
    """The parts of a replay method. The defaults are ExGRPO's.

    mixer  replace_slot   the group has K trajectories, the replayed ones among them
           append         K fresh ones, the replayed ones on top (RePO, RLEP)
           question_only  K fresh ones: the question is asked again, nothing is replayed
           recent_groups  a share of the groups is taken whole from the store (ReMix)
           spent_groups   groups without a gradient are exchanged for stored ones, drawn by their
                          score, sum |A| x std (the replay buffer of TRL's GRPO)
           fifo           the update trains on single trajectories drawn from the store, fresh ones
                          among them, with the advantages they were generated with (2604.08706)
    """

    mixer: Mixer = "replace_slot"
    # What is kept of a step, and when a question counts as how hard
    keep: Keep = "successes"
    difficulty: Difficulty = "successes"
    retire: bool = True
    # Which questions are asked again; None = those that the stream brings, where they are stored
    questions: QuestionSelector | None = field(
        default_factory=lambda: gaussian_buckets(mean=0.5, sigma=0.125)
    )
    experience_ratio: float = 0.5
    replay_ratio: float = 1.0  # mixer fifo: trajectories trained for each one generated
    start_success_rate: float | None = 0.35
    stop_after_steps: int | None = None  # on-policy from there on (ReMix's second half)
    # Which trajectories of a question, and how many
    select: TrajectoryKey = "entropy"
    count: int = 1
    min_stored: int = 1  # questions with fewer are left alone
    prefilter: int | None = None  # score only so many, those of the lowest last-known entropy
    max_age: int | None = None  # in steps; older ones are not replayed
    # What they are to the loss
    weight: Weight = "shaped"
    shaping: float = 0.1
    clip_fresh: bool = False
