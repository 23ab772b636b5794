"""Verifiers, and the pool of killable worker processes they run in. Loads no torch."""

from exgrpo_fast.rewards.functions import BUILT_IN
from exgrpo_fast.rewards.golds import BadGold, check_golds
from exgrpo_fast.rewards.judgement import RewardError
from exgrpo_fast.rewards.pool import RewardPool, RewardSample, Scored
from exgrpo_fast.rewards.references import check_reference, load_function

__all__ = [
    "BUILT_IN",
    "BadGold",
    "RewardError",
    "RewardPool",
    "RewardSample",
    "Scored",
    "check_golds",
    "check_reference",
    "load_function",
]
