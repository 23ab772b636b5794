"""Bytes that vLLM and the replay buffer may take beside the trainer. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.experience.replay.plan import StorePlan, StoreTooSmall

BYTES = {"float32": 4, "bfloat16": 2}
CACHE_BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # vLLM's defaults
CPU_CACHE_BYTES = 1 << 30  # at most, unless the config says more
RESERVE = 0.1  # share of a GPU that no plan touches: contexts, fragments, activations of scoring


@dataclass(frozen=True)
class EnginePlan:
    """What vLLM may take of the device."""

    kv_cache_bytes: int
    max_num_seqs: int
    max_model_len: int
    sleeps: bool

    def note(self) -> str:
        state = "sleeps during the update" if self.sleeps else "stays awake"
        return (
            f"vLLM: {self.kv_cache_bytes / 2**30:.2f} GiB of keys and values for "
            f"{self.max_num_seqs} sequences of up to {self.max_model_len} tokens; {state}"
        )


def max_model_len(config: Config, positions: int) -> int:
    """Longest prompt + completion that a run can ask for; `positions`: all the model has."""
    return min(config.longest_sequence, positions)


def kv_bytes_per_token(model: Any, *, dtype: str) -> int:
    """Keys and values of one token in all layers; `model`: a transformers config."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * size * BYTES[dtype]


def engine_plan(
    config: Config,
    model: Any,
    *,
    num_parameters: int,
    dtype: str,
    device: str,
    device_bytes: int,
    trainer_bytes: int = 0,
    resident_bytes: int = 0,
) -> EnginePlan:
    """`model`: a transformers config; `device_bytes`: of one GPU. What the trainer takes of the
    same GPU: `trainer_bytes` at its peak, `resident_bytes` while completions are generated; 0 where
    it runs elsewhere.

    ConfigError where not even one sequence of full length fits.
    """
    rollout, length = config.rollout, max_model_len(config, model.max_position_embeddings)
    block = CACHE_BLOCK_TOKENS[device]
    one_sequence = -(-length // block) * block * kv_bytes_per_token(model, dtype=dtype)
    wanted = one_sequence * (rollout.max_batch_sequences + 1)
    room, sleeps = CPU_CACHE_BYTES, False
    if device != "cpu":
        usable = int((1 - RESERVE) * device_bytes) - num_parameters * BYTES[dtype]
        awake, asleep = usable - trainer_bytes, usable - resident_bytes
        may_sleep = {"always": True, "never": False, "auto": awake < wanted}[rollout.sleep]
        sleeps = trainer_bytes > 0 and may_sleep
        room = asleep if sleeps else awake
    kv_cache_bytes = _kv_bytes(config, min(wanted, room), one_sequence)
    return EnginePlan(kv_cache_bytes, rollout.max_batch_sequences, length, sleeps)


def _kv_bytes(config: Config, planned: int, one_sequence: int) -> int:
    given = config.rollout.kv_cache_gib
    planned = planned if given is None else int(given * 2**30)
    if planned < one_sequence:
        raise ConfigError(
            f"rollout.kv_cache_gib: {max(planned, 0) / 2**30:.2f} GiB are left for vLLM's keys and "
            f"values, and one sequence of full length needs {one_sequence / 2**30:.2f}; lower "
            f"rollout.max_completion_tokens, or set rollout.sleep to always"
        )
    return planned


def store_plan(config: Config, num_questions: int) -> StorePlan:
    """Of the experience store. ConfigError when the budget does not hold one step's trajectories."""
    rollout, store = config.rollout, config.replay.store
    per_step, num_steps = rollout.prompts_per_step * rollout.group_size, config.train.max_steps
    if store.max_trajectories is not None:  # beside what one step brings
        num_steps = min(num_steps, -(-store.max_trajectories // per_step) + 1)
    try:
        return StorePlan.fit(
            num_questions=num_questions,
            trajectories_per_step=per_step,
            num_steps=num_steps,
            max_tokens=rollout.max_completion_tokens,
            max_bytes=int(store.max_gib * 2**30),
            host_bytes=int(store.host_gib * 2**30),
            page_tokens=store.page_tokens,
            logprob_bytes=BYTES[store.logprob_dtype],
        )
    except StoreTooSmall as error:
        raise ConfigError(f"replay.store.max_gib: {error}") from None


def store_note(plan: StorePlan, device: str) -> str:
    host = f", {plan.num_host_bytes / 2**20:.0f} MiB on the host" if plan.num_host_pages else ""
    return (
        f"experience store: {plan.num_trajectories:,} trajectories, {plan.num_pages:,} pages of "
        f"{plan.page_tokens} tokens, {plan.num_bytes / 2**20:.0f} MiB on {device}{host}"
    )
