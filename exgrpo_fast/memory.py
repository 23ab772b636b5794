"""The memory plan: what a run will hold, from its config alone; and what held it when it ran out.

Loads no torch.
"""

from __future__ import annotations

from typing import Any

from exgrpo_fast.buffer.plan import StorePlan, StoreTooSmall
from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.errors import UserError

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


class OutOfMemory(UserError):
    """Even one sequence by itself does not fit; `table` says what used the memory."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


def out_of_memory(model: Any, *, longest: int, cause: str) -> OutOfMemory:
    """For a training step on `model` whose longest sequence has so many tokens."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    rows = [
        ("weights", weights),
        ("gradients", trained),
        ("two AdamW moments", 2 * trained),
    ]
    lines = [f"{name:<20}{size / 2**30:9.2f} GiB" for name, size in rows]
    lines += [f"{'one sequence':<20}{longest:9d} tokens", f"{'the allocator':<20} {cause}"]
    message = (
        f"out of memory in the update: not even one sequence of {longest} tokens fits; lower "
        f"rollout.max_completion_tokens or replay.store.max_gib, or take a smaller model"
    )
    return OutOfMemory(message, "what used the memory\n" + "\n".join(lines))
