"""Verifiers, and the pool of killable worker processes they run in. Loads no torch."""

from exgrpo_fast.rewards.functions import BUILT_IN, RewardError, check_reference, load_function
from exgrpo_fast.rewards.golds import BadGold, check_golds
from exgrpo_fast.rewards.pool import RewardPool, RewardSample, Scored

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
