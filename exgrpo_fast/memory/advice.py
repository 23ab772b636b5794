"""What to change where a run does not fit: the cheapest changes first, each tried on the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from exgrpo_fast.config import Config, ConfigError, refuse_world_size, with_values
from exgrpo_fast.config.sections import PREFERRED_TOKENS
from exgrpo_fast.memory.planner import GIB, MemoryPlan, Planner

LOW = {"model.weights": "bfloat16", "train.optimizer": "auto"}
RELEASE = {"train.gradient_release": True, "train.max_tokens_per_microbatch": "auto"}
# Tokens of an update, above which one pack of them keeps more than all gradients take.
MOST_IN_ONE_PACK = 4 * PREFERRED_TOKENS
ADAPTER = {"model.lora.rank": 32, "model.weights": "bfloat16"}


@dataclass(frozen=True)
class Change:
    """Keys and their new values, what they cost, and what the update then needs."""

    keys: Mapping[str, Any]
    cost: str
    update_bytes: float = 0.0

    def __str__(self) -> str:
        words = " ".join(f"--{key} {str(value).lower()}" for key, value in self.keys.items())
        return f"{words} (update {self.update_bytes / GIB:.1f} GiB; {self.cost})"


def changes(config: Config) -> Iterator[Change]:
    """From those that change nothing of what is learned to those that do."""
    if not config.model.gradient_checkpointing:
        yield Change({"model.gradient_checkpointing": True}, "a third more computation")
    if config.rollout.sleep == "never":
        yield Change({"rollout.sleep": "auto"}, "some seconds a step")
    small = {"train.max_tokens_per_microbatch": config.longest_sequence}
    yield Change(small, "smaller packs, somewhat slower")
    if config.replay.enabled and config.replay.store.max_gib > 0.5:
        yield Change({"replay.store.max_gib": 0.5}, "less experience is kept")
    if config.model.lora is None:
        has_small_updates = config.update_tokens <= MOST_IN_ONE_PACK
        if has_small_updates:
            yield Change(RELEASE, "a backward pass more")
        yield Change(LOW, "float32-equivalent weights, moments of 8 bits")
        yield Change(LOW | small, "the same in smaller packs")
        if has_small_updates:
            yield Change(LOW | RELEASE, "the same, and a backward pass more")
        least = {"model.weights": "bfloat16", "train.optimizer": "adamw_8bit"}
        yield Change(least | small, "updates are rounded at random")
        yield Change(ADAPTER, "an adapter is trained, not the weights")
        yield Change(ADAPTER | small, "an adapter is trained, not the weights")
    quantised = ADAPTER | {"model.quantization": "nf4"}
    yield Change(quantised, "an adapter on weights of 4 bits, slower")
    yield Change(quantised | small, "an adapter on weights of 4 bits, slower")
    yield Change(
        {"rollout.max_completion_tokens": config.rollout.max_completion_tokens // 2} | small,
        "shorter completions",
    )


def cheapest(planner: Planner, config: Config, *, count: int = 3) -> list[Change]:
    """The first `count` changes with which the run fits; fewer where no more do."""

    def fitting() -> Iterator[Change]:
        found: list[Change] = []
        for change in changes(config):
            if any(less.keys.items() <= change.keys.items() for less in found):
                continue  # a part of it is enough
            made = _try(planner, config, change.keys)
            if made is not None and made.fits:
                found.append(change)
                yield Change(change.keys, change.cost, made.totals["update"])

    return list(islice(fitting(), count))


def _try(planner: Planner, config: Config, keys: Mapping[str, Any]) -> MemoryPlan | None:
    try:
        changed = with_values(config, keys)
        refuse_world_size(changed, planner.machine.processes)
        return planner.plan(changed)
    except ConfigError:
        return None


def refusal(made: MemoryPlan, found: list[Change]) -> str:
    """One line: by how much it does not fit, and what would."""
    usable = made.machine.usable or 0.0
    why = f"{made.peak / GIB:.1f} GiB are needed, {usable / GIB:.1f} can be planned with"
    if made.engine_error is not None and made.peak <= usable:
        why = made.engine_error
    if not found:
        return f"this run does not fit: {why}; no single change of the config makes it fit"
    return f"this run does not fit: {why}; it would with " + "; or ".join(map(str, found))
