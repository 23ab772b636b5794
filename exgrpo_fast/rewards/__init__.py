"""Verifiers, and the pool of killable worker processes they run in. Loads no torch."""

from exgrpo_fast.core.types import RewardSample, Verdict
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.loading import check_reference, load_function
from exgrpo_fast.rewards.pool.jobs import ScoreFuture
from exgrpo_fast.rewards.pool.pool import RewardPool
from exgrpo_fast.rewards.rubrics.rubrics import Rubric
from exgrpo_fast.rewards.rubrics.scorer import RubricScorer
from exgrpo_fast.rewards.verifiers.functions import BUILT_IN
from exgrpo_fast.rewards.verifiers.golds import BadGold, check_golds

__all__ = [
    "BUILT_IN",
    "BadGold",
    "RewardError",
    "RewardPool",
    "RewardSample",
    "Rubric",
    "RubricScorer",
    "Verdict",
    "ScoreFuture",
    "check_golds",
    "check_reference",
    "load_function",
]
