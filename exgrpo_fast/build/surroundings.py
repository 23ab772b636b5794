"""What surrounds a run: quiet libraries, versions, fingerprints."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from transformers import AutoTokenizer

from exgrpo_fast.advantages import ADVANTAGES, Advantage, grpo_sample_std
from exgrpo_fast.bad_batches import BadBatches
from exgrpo_fast.buffer.pool import load_pool, solutions_of
from exgrpo_fast.buffer.selectors import (
    QuestionSelector,
    gaussian_buckets,
    medium_questions,
    uniform_questions,
)
from exgrpo_fast.buffer.store import ExperienceStore
from exgrpo_fast.checkpoint import Checkpoints, load_state, read_manifest
from exgrpo_fast.checkpoint_writer import CheckpointWriter
from exgrpo_fast.collect import Collector, OverlongRule
from exgrpo_fast.config import Config, ConfigError, GymTask, dump_yaml, require
from exgrpo_fast.data import read_rows
from exgrpo_fast.display import Screen
from exgrpo_fast.engines import (
    PreparedEngine,
    end_of_sequence_ids,
    mismatch_rule,
    prepare_engine,
)
from exgrpo_fast.errors import NumericalStop
from exgrpo_fast.evaluate import Evaluator
from exgrpo_fast.experience import Question
from exgrpo_fast.learner import Learner, ReplayTerm
from exgrpo_fast.lora import add_adapter, has_adapter, load_adapter
from exgrpo_fast.memory.plan import MemoryPlan
from exgrpo_fast.memory.store import store_note, store_plan
from exgrpo_fast.metrics import (
    CompletionLog,
    FanOut,
    JsonlSink,
    MetricSink,
    TensorBoardSink,
    WandbSink,
)
from exgrpo_fast.model_folder import HuggingFaceFolder
from exgrpo_fast.optim import Optimiser, linear_warmup
from exgrpo_fast.planning import fitted, wants_preflight
from exgrpo_fast.policy import Policy, PolicyError, Tokenizer, load_model
from exgrpo_fast.preflight import rehearse
from exgrpo_fast.quantization import nf4
from exgrpo_fast.random_state import seed_everything
from exgrpo_fast.reference import AdapterOff, Reference
from exgrpo_fast.resampling.compatibility import (
    fingerprint,
    read_vocabulary,
    refuse_other_vocabulary,
)
from exgrpo_fast.resampling.driver import Resampler
from exgrpo_fast.resampling.transformers_lane import TransformersDrafter, TransformersPrior
from exgrpo_fast.resampling.triggers import Trigger
from exgrpo_fast.rewards import RewardPool, RubricScorer
from exgrpo_fast.rollout.engine import RolloutEngine, Sampling
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.run_folder import RunFolder
from exgrpo_fast.sources.fresh import FreshSource
from exgrpo_fast.sources.hindsight import HindsightRecipe, HindsightSource
from exgrpo_fast.sources.hindsight_prompt import HindsightPrompt
from exgrpo_fast.sources.prior import NoPrior, PriorRecipe, PriorSource
from exgrpo_fast.sources.questions import QuestionStream
from exgrpo_fast.sources.recall import NoReplay, Replay
from exgrpo_fast.sources.replay import ReplayRecipe, ReplaySource
from exgrpo_fast.trainer import Trainer
from exgrpo_fast.training_data import load_data, refuse_bad_golds
from exgrpo_fast.verify import Decode, Verifier
from exgrpo_kernels import PolicyObjective


def quiet_libraries() -> None:
    """One screen, ours: no progress bars and advice from below."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def config_digest(config: Config) -> str:
    return xxhash.xxh3_128_hexdigest(dump_yaml(config).encode())


def package_versions() -> dict[str, str]:
    from exgrpo_fast import __version__

    names = ("torch", "transformers", "safetensors", "numpy")
    versions = {"exgrpo-fast": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in names}


def environment(device: str) -> dict[str, Any]:
    """env.json: what a reader needs to judge the figures of a run."""
    from exgrpo_fast import __version__
    from exgrpo_fast.doctor import collect

    return {"exgrpo_fast": __version__, "device": device, **collect(self_test=False)}
