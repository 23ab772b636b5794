"""Which rollout engine a config asks for, and how it is put together.

vLLM has to be up before the trainer's weights take their memory, but needs them to stay in step;
so an engine is made in two halves: `prepare_engine`, then what it returns is given the policy.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.memory.engine import EnginePlan, engine_plan
from exgrpo_fast.memory.plan import Machine, Planner
from exgrpo_fast.mismatch import MismatchRule
from exgrpo_fast.policy import Policy, Tokenizer
from exgrpo_fast.rollout.canary import TOLERANCE, VerifiedEngine
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.transformers_engine import TransformersEngine

# (policy, the ids of any prompt) -> engine
Attach = Callable[[Policy, Sequence[int]], RolloutEngine]
START_SECONDS = 600.0  # a large model is read from a slow disk
Note = Callable[[str], None]


def engine_kind(config: Config, device: str) -> str:
    """`rollout.engine` with `auto` resolved. ConfigError where vLLM is asked for and absent."""
    kind, installed = config.rollout.engine, importlib.util.find_spec("vllm") is not None
    if kind == "auto":
        return "vllm" if installed and device == "cuda" else "transformers"
    if kind == "vllm" and not installed:
        raise ConfigError("rollout.engine vllm: vLLM is not installed; `exgrpo-fast doctor`")
    if kind == "vllm_server" and not installed and not config.rollout.server.urls:
        raise ConfigError("rollout.engine vllm_server: vLLM is not installed; `exgrpo-fast doctor`")
    return kind


def mismatch_rule(config: Config, device: str) -> MismatchRule:
    """The trainer's own weights have no mismatch to correct."""
    if engine_kind(config, device) == "transformers":
        return MismatchRule()
    return MismatchRule(**config.algorithm.mismatch.model_dump())


def prepare_engine(
    config: Config,
    folder: str,
    tokenizer: Tokenizer,
    *,
    device: str,
    stack: ExitStack,
    log_folder: Path | None = None,
    note: Note = lambda line: None,
) -> Attach:
    """`folder`: of the weights to begin with; `stack`: ends what is started here."""
    kind = engine_kind(config, device)
    if kind == "transformers":
        return lambda policy, prompt_ids: make_transformers_engine(config, policy, tokenizer)
    plan = plan_engine(config, folder, device=device, shared=kind == "vllm")
    if kind == "vllm" or not config.rollout.server.urls:
        note(plan.note())
    model = {
        "folder": folder,
        "eos_token_ids": end_of_sequence_ids(generation_config(folder), tokenizer),
        "device": device,
        "dtype": config.model.compute_dtype(device),
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "seed": config.train.seed,
        "can_sleep": plan.sleeps,
    }
    make = _prepare_in_process if kind == "vllm" else _prepare_servers
    attach = make(config, model, plan, device=device, stack=stack, log_folder=log_folder)

    def verified(policy: Policy, prompt_ids: Sequence[int]) -> RolloutEngine:
        return VerifiedEngine(
            attach(policy),
            policy,
            prompt_ids=prompt_ids,
            max_model_len=plan.max_model_len,
            tolerance=config.rollout.sync_tolerance or TOLERANCE[model["dtype"]],
        )

    return verified


def plan_engine(config: Config, folder: str, *, device: str, shared: bool) -> EnginePlan:
    """`shared`: the trainer lives on the same device."""
    model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    num_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    if shared and device == "cuda":
        made = Planner(model, Machine("cuda", num_bytes, "vllm")).plan(config)
        if made.engine is None:
            raise ConfigError(made.engine_error or "rollout.engine: no plan for vLLM")
        return made.engine
    return engine_plan(
        config,
        model,
        num_parameters=count_parameters(model),
        dtype=config.model.compute_dtype(device),
        device=device,
        device_bytes=num_bytes,
    )


def count_parameters(model: Any) -> int:
    """From the shapes alone: nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model).num_parameters()


def _prepare_in_process(
    config: Config, model: dict[str, Any], plan: EnginePlan, *, stack: ExitStack, **_: Any
) -> Callable[[Policy], RolloutEngine]:
    from exgrpo_fast.rollout.vllm_engine import VllmEngine
    from exgrpo_fast.rollout.vllm_model import VllmModel

    vllm = VllmModel(**model)
    stack.callback(vllm.close)
    if plan.sleeps:
        vllm.sleep()

    def attach(policy: Policy) -> RolloutEngine:
        engine = VllmEngine(vllm, policy, sleeps=plan.sleeps)
        engine.awake = not plan.sleeps  # the first `sync` wakes it
        return engine

    return attach


def _prepare_servers(
    config: Config,
    model: dict[str, Any],
    plan: EnginePlan,
    *,
    device: str,
    stack: ExitStack,
    log_folder: Path | None,
) -> Callable[[Policy], RolloutEngine]:
    from exgrpo_fast.rollout.server_engine import ServerEngine
    from exgrpo_fast.rollout.server_process import ServerConnection, ServerProcess
    from exgrpo_fast.rollout.weight_transfer import BroadcastSender, SharedMemorySender

    server = config.rollout.server
    processes: list[ServerProcess] = []
    for number in range(0 if server.urls else server.count):
        gpu = server_gpu(config, number) if device == "cuda" else None
        log = log_folder / f"rollout-{number}.log" if log_folder else None
        process = ServerProcess(model, name=str(number), gpu=gpu, log=log)
        stack.callback(process.close)
        processes.append(process)  # they load while the trainer does

    def attach(policy: Policy) -> RolloutEngine:
        for process in processes:
            process.wait_until_ready(deadline=START_SECONDS)
        key = os.environ.get(server.key_env, "")
        connections = [process.connection for process in processes] or [
            ServerConnection(name=url, key=key, url=url) for url in server.urls or []
        ]
        dtype = getattr(torch, model["dtype"])
        if server.weights == "shared_memory":
            sender = SharedMemorySender(dtype)
        else:
            sender = BroadcastSender(
                dtype, device=torch.device(device), num_servers=len(connections)
            )
        stack.callback(sender.close)
        return ServerEngine(
            connections, policy, sender, processes=processes, deadline=server.deadline_seconds
        )

    return attach


def server_gpu(config: Config, number: int) -> int:
    """ConfigError where there is no GPU for a server."""
    gpus, found = config.rollout.server.gpus, torch.cuda.device_count()
    gpu = number + 1 if gpus is None else (gpus[number] if number < len(gpus) else found)
    if gpu >= found:
        raise ConfigError(
            f"rollout.server.gpus: no GPU for server {number}; this machine has {found}, and the "
            f"trainer uses the first (rollout.engine vllm shares one GPU)"
        )
    return gpu


def make_transformers_engine(
    config: Config, policy: Policy, tokenizer: Tokenizer
) -> TransformersEngine:
    eos = end_of_sequence_ids(policy.model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id
    return TransformersEngine(
        policy,
        eos_token_ids=eos,
        pad_token_id=eos[0] if pad is None else pad,  # masked out: any id does
        max_batch_sequences=config.rollout.max_batch_sequences,
    )


def generation_config(folder: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def end_of_sequence_ids(generation: GenerationConfig | None, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's own end token first, then those of the model's generation config."""
    listed: Any = generation.eos_token_id if generation else None
    others = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(e for e in [tokenizer.eos_token_id, *others] if e is not None))
