"""The composition root: a checked Config becomes objects. The only room that names them all.

surroundings  libraries, versions, fingerprints
models        policy, reference, adapter, tokenizer     rewards  verifiers and evaluation
sources       replay, prior, hindsight                  trainer  the trainer and its parts
rollouts      the engine of a run, its log         run      all of it opened for one run, and closed
"""

from exgrpo_fast.build.environment import environment, package_versions, quiet_libraries
from exgrpo_fast.build.experience import make_hindsight_prompt
from exgrpo_fast.build.models import (
    adapter_of,
    load_tokenizer,
    make_decode,
    make_policy,
    make_reference,
    refuse_broken_weights,
    refuse_other_tokenizer,
    start_folder,
    vocabulary_of,
)
from exgrpo_fast.build.rewards import make_evaluator, make_rewards
from exgrpo_fast.build.run import Run, open_run, run_preflight, take_up
from exgrpo_fast.build.trainer import make_trainer

__all__ = [
    "Run",
    "adapter_of",
    "environment",
    "load_tokenizer",
    "make_decode",
    "make_evaluator",
    "make_hindsight_prompt",
    "make_policy",
    "make_reference",
    "make_rewards",
    "make_trainer",
    "open_run",
    "package_versions",
    "quiet_libraries",
    "refuse_broken_weights",
    "refuse_other_tokenizer",
    "run_preflight",
    "start_folder",
    "take_up",
    "vocabulary_of",
]
