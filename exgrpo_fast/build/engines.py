"""The rollout engine of a config, in two steps.

`reserve_engine` comes before the policy: vLLM takes its memory when it starts, and beside a
trainer's weights there would be too little; rollout servers load while the trainer does.
`build_engine` comes after it: an engine needs the policy whose weights it follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exgrpo_fast.build.environment import config_digest
from exgrpo_fast.build.models import make_plain_policy
from exgrpo_fast.config import Config, ConfigError, engine_kind, refuse_engine_world_size
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.memory.budgets import EnginePlan, engine_plan
from exgrpo_fast.memory.planner import Machine, Planner
from exgrpo_fast.model.folder_reading import Tokenizer, end_of_sequence_ids, read_generation_config
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.endpoint_engine import EndpointEngine
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.rollout.mismatch import MismatchRule
from exgrpo_fast.rollout.shared_engine import AnnouncedPolicy, CopiedEngine, SharedEngine
from exgrpo_fast.rollout.sync_check import TOLERANCE, VerifiedEngine
from exgrpo_fast.rollout.vllm.engine import VllmEngine
from exgrpo_fast.rollout.vllm.model import VllmModel

if TYPE_CHECKING:
    from exgrpo_fast.build.servers import RolloutServers

log = logging.getLogger(__name__)

Note = Callable[[str], None]
E = TypeVar("E")


@dataclass(frozen=True)
class Reservation:
    """What was started for an engine before the policy's weights were loaded."""

    folder: str  # of the weights to begin with
    stack: ExitStack  # closed at the end of the block
    plan: EnginePlan | None = None  # of vLLM; None for transformers, and on ranks other than 0
    vllm: VllmModel | None = None  # in this process
    vllm_prior: VllmModel | None = None  # beside it: the prior policy of EAPO
    servers: RolloutServers | None = None


@contextmanager
def reserve_engine(
    config: Config,
    folder: str,
    tokenizer: Tokenizer,
    *,
    device: str,
    processes: Processes = SINGLE_PROCESS,
    log_folder: Path | None = None,
    note: Note = lambda line: None,
) -> Iterator[Reservation]:
    """Start vLLM in this process or in servers, on rank 0; the end of the block closes it."""
    refuse_unplaced_engine(config, device, processes.count)
    with ExitStack() as stack:
        nothing = Reservation(folder, stack)

        def reserve() -> Reservation:
            if engine_kind(config, device) == "transformers":
                return nothing
            return reserve_vllm(config, nothing, tokenizer, device, log_folder, note)

        yield processes.run_on_rank0(reserve, pack=lambda made: None) or nothing


def refuse_unplaced_engine(config: Config, device: str, count: int) -> None:
    """ConfigError where the engine has no separate device beside `count` ranks."""
    kind, server = engine_kind(config, device), config.rollout.server
    refuse_engine_world_size(config, kind, count)
    is_placed = server.gpus is not None or server.urls
    if kind == "vllm_server" and count > 1 and device == "cuda" and not is_placed:
        raise ConfigError(
            f"rollout.server.gpus is not set: with {count} processes, name GPUs that none of them "
            f"trains on, or rollout.server.urls"
        )


def reserve_vllm(
    config: Config,
    nothing: Reservation,
    tokenizer: Tokenizer,
    device: str,
    log_folder: Path | None,
    note: Note,
) -> Reservation:
    """vLLM in this process, with EAPO's prior beside it where both stay awake; or its servers."""
    folder, stack, kind = nothing.folder, nothing.stack, engine_kind(config, device)
    plan = plan_engine(config, folder, device=device, shared=kind == "vllm")
    if kind == "vllm" or not config.rollout.server.urls:
        note(plan.note())
    arguments: dict[str, Any] = {
        "folder": folder,
        "eos_token_ids": end_of_sequence_ids(read_generation_config(folder), tokenizer),
        "device": device,
        "dtype": config.model.compute_dtype(device),
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "seed": config.train.seed,
        "can_sleep": plan.sleeps,
        "top_k": config.rollout.top_k,
    }
    if kind == "vllm_server":
        # httpx2 is needed for servers alone.
        from exgrpo_fast.build.servers import RolloutServers

        servers = RolloutServers(config, arguments, stack, log_folder=log_folder)
        return Reservation(folder, stack, plan, servers=servers)
    vllm = with_less_memory_once(lambda changes: VllmModel(**arguments | changes), arguments)
    stack.callback(vllm.close)
    prior = None
    if prior_runs_in_vllm(config, plan):
        # vLLM engines of one process must start and end together. One token more: a sequence is
        # scored by asking for the token after it.
        arguments["folder"] = config.prior_resampling.model
        arguments["max_model_len"] += 1
        prior = VllmModel(**arguments)
        stack.callback(prior.close)
    if plan.sleeps:
        vllm.sleep()
    return Reservation(folder, stack, plan, vllm, prior)


def build_engine(
    config: Config,
    policy: Policy,
    tokenizer: Tokenizer,
    reserved: Reservation,
    *,
    prompt_ids: Sequence[int],
    journal: Path | None = None,
    version: int = 0,
) -> RolloutEngine:
    """The engine that follows the weights of `policy`: inside out, what generates, the check of its
    weights, the journal, and the broadcast to other ranks.

    `prompt_ids`: of any question, for the check; `journal`: folder of the finished rollouts, so that
    a resumed run does not generate them again; `version`: finished steps.
    """
    processes = policy.processes
    if not processes.is_main:
        return SharedEngine(None, policy, processes)
    source = AnnouncedPolicy(policy, processes) if processes.count > 1 else policy
    if reserved.plan is None:
        engine = transformers_engine(config, source, tokenizer, reserved.folder)
    else:
        dtype = config.model.compute_dtype(policy.device.type)
        if reserved.servers is not None:
            engine = reserved.servers.engine(source)
        else:
            assert reserved.vllm is not None
            engine = VllmEngine(reserved.vllm, source, sleeps=reserved.plan.sleeps)
        engine = VerifiedEngine(
            engine,
            source,
            prompt_ids=prompt_ids,
            max_model_len=reserved.plan.max_model_len,
            tolerance=config.rollout.sync_tolerance or TOLERANCE[dtype],
        )
    if journal is not None:
        identity = config_digest(config)
        engine = JournalledEngine(engine, journal, identity=identity, version=version)
    return SharedEngine(engine, policy, processes) if processes.count > 1 else engine


def find_layer(engine: RolloutEngine, kind: type[E]) -> E | None:
    """The engine of this class: `engine`, or one that it wraps; None where there is none."""
    layer: Any = engine
    while layer is not None and not isinstance(layer, kind):
        layer = getattr(layer, "engine", None)
    return layer


def transformers_engine(
    config: Config, source: Policy, tokenizer: Tokenizer, folder: str
) -> RolloutEngine:
    """`generate` of transformers; beside a sharded policy by a whole copy on rank 0."""
    if not isinstance(source, AnnouncedPolicy):
        return make_transformers_engine(config, source, tokenizer)
    copy = make_plain_policy(config, folder, dtype=torch.float32, device=source.device.type)
    copy.freeze()
    return CopiedEngine(make_transformers_engine(config, copy, tokenizer), copy, source)


def mismatch_rule(config: Config, device: str) -> MismatchRule:
    """The trainer's own weights have no mismatch to correct."""
    if engine_kind(config, device) == "transformers":
        return MismatchRule()
    return MismatchRule(**config.algorithm.mismatch.model_dump())


def engine_scores(config: Config, policy: Policy) -> bool:
    """Whether the log-probs with which the engine draws are the policy's, up to float32 rounding.

    On a CPU alone, where no batch is halved for memory: a resumed run generates in the same batches,
    whose rounding is the same. Not with the behaviour log-probs as reference of a KL term: rounding
    would decide the sign of the log ratio.
    """
    kl = config.algorithm.kl
    return (
        config.rollout.scoring == "auto"
        and engine_kind(config, policy.device.type) == "transformers"
        and policy.device.type == "cpu"
        and policy.compute_dtype == torch.float32
        and policy.processes.count == 1
        and not config.train.allow_mismatch
        and not (kl.coef > 0 and kl.reference == "behaviour")
    )


def plan_engine(config: Config, folder: str, *, device: str, shared: bool) -> EnginePlan:
    """`shared`: the trainer uses the same device."""
    model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    num_bytes = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    if shared and device == "cuda":
        made = Planner(model, Machine("cuda", num_bytes, "vllm")).plan(config)
        if made.engine is None:
            raise ConfigError(made.engine_error or "rollout.engine: no plan for vLLM")
        return made.engine
    with torch.device("meta"):  # from the shapes alone: nothing is allocated
        num_parameters = AutoModelForCausalLM.from_config(model).num_parameters()
    return engine_plan(
        config,
        model,
        num_parameters=num_parameters,
        dtype=config.model.compute_dtype(device),
        device=device,
        device_bytes=num_bytes,
    )


def prior_runs_in_vllm(config: Config, plan: EnginePlan) -> bool:
    """Not for a trigger that reads whole distributions, which vLLM does not return, nor where vLLM
    sleeps: of two engines in one process none can."""
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
    eos = end_of_sequence_ids(read_generation_config(folder), tokenizer)
    return EndpointEngine(url, eos_token_ids=eos, model=model, api_key_env=key_env)
