"""Where responses come from: the engine of a run, its log, and what several processes share of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from exgrpo_fast.build.engines import PreparedEngine, prepare_engine
from exgrpo_fast.build.environment import config_digest
from exgrpo_fast.build.models import make_plain_policy
from exgrpo_fast.config import Config, ConfigError, refuse_engine_with_several
from exgrpo_fast.config.limits import engine_kind
from exgrpo_fast.core.process_group import Processes
from exgrpo_fast.model.policy import Policy, Tokenizer
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.rollout.shared_engine import AnnouncedPolicy, CopiedEngine, SharedEngine
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen


def prepare_rollouts(
    config: Config,
    folder: str,
    tokenizer: Tokenizer,
    run_folder: RunFolder,
    screen: Screen,
    stack: contextlib.ExitStack,
    processes: Processes,
    *,
    device: str,
) -> PreparedEngine | None:
    """The engine of the first process; None in the others. `folder`: of the weights."""
    kind = engine_kind(config, device)
    refuse_engine_with_several(config, kind, processes.count)
    server = config.rollout.server
    unnamed = server.gpus is None and not server.urls
    if kind == "vllm_server" and processes.count > 1 and device == "cuda" and unnamed:
        raise ConfigError(
            f"rollout.server.gpus is not set: with {processes.count} processes, name GPUs that "
            f"none of them trains on, or rollout.server.urls"
        )

    def prepare() -> PreparedEngine:
        return prepare_engine(
            config,
            folder,
            tokenizer,
            device=device,
            stack=stack,
            log_folder=run_folder.path,
            note=screen.note,
        )

    return processes.run_on_rank0(prepare, pack=lambda made: None)


def make_engine(
    config: Config,
    prepared: PreparedEngine | None,
    policy: Policy,
    folder: RunFolder,
    *,
    model_path: str,
    prompt_ids: Sequence[int],
    num_steps: int,
    device: str,
) -> RolloutEngine:
    """With a log of what it has finished, so that no life of a run pays for it twice."""
    engine = None
    if prepared is not None:
        engine = JournalledEngine(
            attach(config, prepared, policy, model_path, prompt_ids, device=device),
            folder.rollouts,
            identity=config_digest(config),
            version=num_steps,
        )
    if engine is not None and policy.processes.count == 1:
        return engine
    return SharedEngine(engine, policy, policy.processes)


def attach(
    config: Config,
    prepared: PreparedEngine,
    policy: Policy,
    folder: str,
    prompt_ids: Sequence[int],
    *,
    device: str,
) -> RolloutEngine:
    """The engine with the policy whose weights it follows; a sharded one has a whole copy beside."""
    if policy.processes.count == 1:
        return prepared.attach(policy, prompt_ids)
    announced = AnnouncedPolicy(policy, policy.processes)
    if engine_kind(config, device) != "transformers":
        return prepared.attach(announced, prompt_ids)
    copy = make_plain_policy(config, folder, dtype=torch.float32, device=device)
    copy.model.requires_grad_(False)
    copy.sizes.are_fixed = True  # the other processes wait: nothing is done twice
    return CopiedEngine(prepared.attach(copy, prompt_ids), copy, announced)
