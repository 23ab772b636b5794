"""Builds the rollout engine that a config asks for.

vLLM has to be up before the trainer's weights take their memory, but needs them to stay in step;
so an engine is made in two halves: `prepare_engine`, then what it returns is given the policy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.config.limits import engine_kind
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.memory.engine import EnginePlan, engine_plan
from exgrpo_fast.memory.plan import Machine, Planner
from exgrpo_fast.model.policy import Policy, Tokenizer
from exgrpo_fast.rollout.endpoint_engine import EndpointEngine
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.mismatch import MismatchRule
from exgrpo_fast.rollout.sync_check import TOLERANCE, VerifiedEngine

if TYPE_CHECKING:
    from exgrpo_fast.rollout.vllm.engine import VllmEngine
    from exgrpo_fast.rollout.vllm.model import VllmModel

log = logging.getLogger(__name__)

START_SECONDS = 600.0  # a large model is read from a slow disk
Note = Callable[[str], None]


@dataclass
class PreparedEngine:
    """An engine without its policy."""

    make: Callable[[Policy, Sequence[int]], RolloutEngine]
    prior: VllmModel | None = None  # beside an engine in this process, to guide its drafts
    drafting: VllmEngine | None = None

    def attach(self, policy: Policy, prompt_ids: Sequence[int]) -> RolloutEngine:
        """`prompt_ids`: of any question."""
        return self.make(policy, prompt_ids)


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
) -> PreparedEngine:
    """`folder`: of the weights to begin with; `stack`: ends what is started here."""
    kind = engine_kind(config, device)
    if kind == "transformers":
        return PreparedEngine(
            lambda policy, prompt_ids: make_transformers_engine(config, policy, tokenizer)
        )
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
    tolerance = config.rollout.sync_tolerance or TOLERANCE[config.model.compute_dtype(device)]

    def verified(
        engine: RolloutEngine, policy: Policy, prompt_ids: Sequence[int]
    ) -> VerifiedEngine:
        return VerifiedEngine(
            engine,
            policy,
            prompt_ids=prompt_ids,
            max_model_len=plan.max_model_len,
            tolerance=tolerance,
        )

    if kind == "vllm":
        return _prepare_in_process(config, model, plan, stack=stack, verified=verified)
    attach = _prepare_servers(config, model, device=device, stack=stack, log_folder=log_folder)
    return PreparedEngine(lambda policy, ids: verified(attach(policy), policy, ids))


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
    config: Config,
    model: dict[str, Any],
    plan: EnginePlan,
    *,
    stack: ExitStack,
    verified: Callable[[RolloutEngine, Policy, Sequence[int]], VerifiedEngine],
) -> PreparedEngine:
    from exgrpo_fast.rollout.vllm.engine import VllmEngine
    from exgrpo_fast.rollout.vllm.model import VllmModel

    vllm = with_less_memory_once(lambda changes: VllmModel(**{**model, **changes}), model)
    stack.callback(vllm.close)
    prepared = PreparedEngine(lambda policy, prompt_ids: attach(policy, prompt_ids))
    if prior_runs_in_vllm(config, plan):
        # Engines of one process have to be made together, and end together. One token more: to
        # score a whole sequence is to ask for what follows it.
        prior = {**model, "folder": config.prior_resampling.model}
        prior["max_model_len"] = plan.max_model_len + 1
        prepared.prior = VllmModel(**prior)
        stack.callback(prepared.prior.close)
    if plan.sleeps:
        vllm.sleep()

    def attach(policy: Policy, prompt_ids: Sequence[int]) -> RolloutEngine:
        prepared.drafting = VllmEngine(vllm, policy, sleeps=plan.sleeps)
        return verified(prepared.drafting, policy, prompt_ids)

    return prepared


def prior_runs_in_vllm(config: Config, plan: EnginePlan) -> bool:
    """A trigger of whole distributions needs the transformers back end, which goes with any engine;
    and of two engines in one process none can sleep."""
    prior = config.prior_resampling
    of_state = Trigger(prior.trigger, prior.threshold, prior.rate).of_state
    return prior.enabled and prior.model is not None and not of_state and not plan.sleeps


def with_less_memory_once(make: Callable[[dict[str, Any]], Any], model: dict[str, Any]) -> Any:
    """Try again with half the cache and half the sequences; ConfigError where that fails too."""
    changes: dict[str, Any] = {}
    for attempt in range(2):
        try:
            return make(changes)
        except torch.OutOfMemoryError as error:
            log.warning("vLLM ran out of memory: %s", error)
            if attempt == 0:
                torch.cuda.empty_cache()
                changes = {key: model[key] // 2 for key in ("kv_cache_bytes", "max_num_seqs")}
    raise ConfigError(
        f"rollout.kv_cache_gib: vLLM runs out of memory with {model['kv_cache_bytes'] / 2**30:.2f} "
        f"GiB and with half of it; lower it, or rollout.max_batch_sequences, or set rollout.sleep "
        f"to always"
    )


def _prepare_servers(
    config: Config,
    model: dict[str, Any],
    *,
    device: str,
    stack: ExitStack,
    log_folder: Path | None,
) -> Callable[[Policy], RolloutEngine]:
    from exgrpo_fast.rollout.server.engine import ServerEngine
    from exgrpo_fast.rollout.server.process import ServerConnection, ServerProcess
    from exgrpo_fast.rollout.server.weight_transfer import BroadcastSender, SharedMemorySender

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
                dtype,
                device=torch.device(device),
                num_servers=len(connections),
                host=server.host,
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


def make_endpoint_engine(
    folder: str, tokenizer: Tokenizer, *, url: str, model: str | None, key_env: str | None
) -> EndpointEngine:
    """Somebody else's vLLM server; of `folder` only the end-of-sequence tokens are read."""
    eos = end_of_sequence_ids(generation_config(folder), tokenizer)
    return EndpointEngine(url, eos_token_ids=eos, model=model, api_key_env=key_env)


def generation_config(folder: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        return None


def end_of_sequence_ids(generation: GenerationConfig | None, tokenizer: Tokenizer) -> list[int]:
    """The tokenizer's own end token first, then those of the model's generation config."""
    listed: Any = generation.eos_token_id if generation else None
    others = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(e for e in [tokenizer.eos_token_id, *others] if e is not None))
