"""The models of a run: the folder to start from, policy and adapter, reference policies, teacher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.build.quickstart.prepare import prepare_quickstart
from exgrpo_fast.config import Config, ConfigError, GymTask, require
from exgrpo_fast.core.dtensor import local_shard
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes, mesh_of
from exgrpo_fast.data import read_rows
from exgrpo_fast.model.attention.backends import choose, refusal
from exgrpo_fast.model.frozen import nf4
from exgrpo_fast.model.lora import add_adapter, has_adapter, load_adapter
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.distillation import VocabularyDistillation
from exgrpo_fast.training.reference import AdapterOff, BehaviourReference, Reference


def start_folder(config: Config, folder: RunFolder, screen: Screen, *, device: str) -> str:
    """The folder of the initial policy; made or converted first where there is none."""
    if config.model.name != "quickstart":
        name = require(config.model.name, "model.name", "a folder, a hub name or a .gguf file")
        return model_folder(name, screen)
    path = folder.path / "warm_start"
    if not path.exists():
        for source in (config.data.train, config.data.eval):
            if isinstance(source, GymTask):  # a misspelt task is found before the warm start
                next(iter(read_rows(source.model_dump())), None)
        unfinished = folder.path / ".warm_start.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that died here
        prepare_quickstart(config, unfinished, screen, device=device)
        os.rename(unfinished, path)
    return str(path)


def make_policy(
    config: Config,
    name: str,
    *,
    device: str,
    adapter: Path | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> Policy:
    """The policy of a run; `adapter`: a folder whose adapter goes on, under model.lora."""
    refuse_impossible_attention(config, device)
    lora, dtype = config.model.lora, getattr(torch, config.model.compute_dtype(device))
    quantization = nf4(dtype, device=device) if config.model.quantization else None

    def load() -> transformers.PreTrainedModel:
        weights = getattr(torch, config.model.weights)
        model = load_model(name, dtype=weights, quantization=quantization)
        if lora is not None:
            add_adapter(model, **lora.model_dump(), seed=config.train.seed, name=name)
            if adapter is not None:
                load_adapter(model, adapter)
        return model

    return wrap(config, load, device=device, processes=processes)


def refuse_impossible_attention(config: Config, device: str) -> None:
    """ConfigError where the back end cannot run here, whatever the model."""
    asked, dtype = config.model.attention, getattr(torch, config.model.compute_dtype(device))
    refused = refusal(choose(asked, device=device, dtype=dtype), device=device, dtype=dtype)
    if refused is not None:
        raise ConfigError(f"model.attention {asked} {refused}")


def wrap(
    config: Config,
    load: Callable[[], transformers.PreTrainedModel],
    *,
    device: str,
    processes: Processes = SINGLE_PROCESS,
) -> Policy:
    """`load` is called by one rank of a machine at a time: each keeps its shard only."""
    settings: dict[str, Any] = {
        "compute_dtype": getattr(torch, config.model.compute_dtype(device)),
        "gradient_checkpointing": config.gradient_checkpointing,
        "offload_activations": config.model.offload_activations,
        "attention": config.model.attention,
        "dropout": config.model.dropout,
        "tile_tokens": config.tile_tokens,
        "temperature": config.rollout.temperature,
        "max_tokens_per_microbatch": config.microbatch_tokens,
    }
    if processes.count == 1:
        policy = Policy(load(), device=device, **settings)
        if config.train.allow_mismatch:
            policy.longest = None
        return policy
    mesh = mesh_of(processes)
    return processes.one_rank_at_a_time(
        lambda: ShardedPolicy(load(), mesh=mesh, processes=processes, **settings)
    )


def make_plain_policy(
    config: Config,
    name: str,
    *,
    dtype: torch.dtype,
    device: str,
    processes: Processes = SINGLE_PROCESS,
) -> Policy:
    """A copy without adapters, for merged weights."""
    return wrap(config, lambda: load_model(name, dtype=dtype), device=device, processes=processes)


def make_reference(
    config: Config, name: str, policy: Policy
) -> Reference | BehaviourReference | None:
    """The frozen policies of a KL term; with adapters the base is the policy with them switched off."""
    kl = config.algorithm.kl
    if kl.coef == 0.0:
        return None
    if kl.reference == "behaviour":
        return BehaviourReference()
    keeps_base = has_adapter(policy.model) and kl.rebase_at_step is None
    return Reference(
        AdapterOff(policy) if keeps_base else make_frozen_policy(config, name, policy),
        make_frozen_policy(config, name, policy) if kl.previous_share else None,
        previous_share=kl.previous_share,
        rebase_at_step=kl.rebase_at_step,
    )


def make_frozen_policy(config: Config, name: str, policy: Policy) -> Policy:
    """Another frozen model, a reference or a teacher, on the device of the policy."""
    weights, device = getattr(torch, config.model.weights), policy.device.type
    made = make_plain_policy(config, name, dtype=weights, device=device, processes=policy.processes)
    made.sizes = policy.sizes  # on one device, what fits the one fits the other
    made.freeze()
    return made


def make_distillation(config: Config, policy: Policy) -> VocabularyDistillation | None:
    """None without a teacher, and for the sampled token. ConfigError for heads that its loss cannot
    compute."""
    distillation = config.algorithm.distillation
    if distillation.divergence == "sampled" or distillation.teacher is None:
        return None
    teacher = make_frozen_policy(config, distillation.teacher, policy)
    for key, model in (("model.name", policy), ("algorithm.distillation.teacher", teacher)):
        if model.head.bias is not None or model.head.softcap is not None:
            raise ConfigError(
                f"algorithm.distillation.divergence {distillation.divergence}: the head of {key} "
                f"has a bias or caps its logits; set divergence to sampled"
            )
    return VocabularyDistillation(
        teacher,
        distillation.divergence,
        mixture=distillation.mixture,
        coef=distillation.coef,
        with_rewards=distillation.rewards,
    )


def adapter_of(config: Config, checkpoint: Path | None) -> Path | None:
    """The folder of the adapter to resume. ConfigError where only one of run and checkpoint has one."""
    if checkpoint is None:
        return None
    adapter = checkpoint / "adapter"
    if adapter.exists() and config.model.lora is None:
        raise ConfigError(f"--resume: {checkpoint} holds an adapter, and model.lora is not set")
    return adapter if config.model.lora else None


def refuse_broken_weights(policy: Policy, path: str) -> None:
    """NumericalStop: nothing can be sampled from weights that are not finite."""
    for name, parameter in policy.model.named_parameters():
        if parameter.is_floating_point() and not local_shard(parameter).isfinite().all():
            raise NumericalStop(f"{path}: {name} holds a value that is not finite")
