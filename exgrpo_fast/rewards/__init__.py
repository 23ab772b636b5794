"""Verifiers, and the pool of killable worker processes they run in. Loads no torch."""

from exgrpo_fast.rewards.functions import BUILT_IN
from exgrpo_fast.rewards.golds import BadGold, check_golds
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.pool import RewardPool
from exgrpo_fast.rewards.references import check_reference, load_function
from exgrpo_fast.rewards.rubric_scorer import RubricScorer
from exgrpo_fast.rewards.rubrics import Rubric
from exgrpo_fast.rewards.tickets import RewardSample, Scored, Ticket

__all__ = [
    "BUILT_IN",
    "BadGold",
    "RewardError",
    "RewardPool",
    "RewardSample",
    "Rubric",
    "RubricScorer",
    "Scored",
    "Ticket",
    "check_golds",
    "check_reference",
    "load_function",
]
