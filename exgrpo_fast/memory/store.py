"""Of the experience store: its plan by the config. Loads no torch."""

from __future__ import annotations

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.experience.replay.plan import StorePlan, StoreTooSmall

BYTES = {"float32": 4, "bfloat16": 2}


def store_plan(config: Config, num_questions: int) -> StorePlan:
    """Of the experience store. ConfigError when the budget does not hold one step's trajectories."""
    rollout, store = config.rollout, config.replay.store
    try:
        return StorePlan.fit(
            num_questions=num_questions,
            trajectories_per_step=rollout.prompts_per_step * rollout.group_size,
            num_steps=config.train.max_steps,
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
