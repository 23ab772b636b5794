"""The memory plan of a run before its weights are loaded, on this machine or another GPU.

Where the run does not fit it says what to change: the cheapest changes first, each tried on the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig

from exgrpo_fast.config import (
    Config,
    ConfigError,
    engine_kind,
    refuse_engine_world_size,
    refuse_small_packs,
    refuse_world_size,
    with_values,
)
from exgrpo_fast.config.sections import PREFERRED_TOKENS
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.text import first_line
from exgrpo_fast.memory.planner import GIB, Machine, MemoryPlan, Planner, table, with_sizes


class NoShapes(ConfigError):
    """The model's config cannot be read: not there, or not reachable from here."""


@dataclass(frozen=True)
class Planned:
    """A plan as text, and why the run cannot begin, if it cannot."""

    plan: MemoryPlan
    text: str
    refusal: str | None

    def accepted(self, note: Callable[[str], None]) -> MemoryPlan:
        """The plan, once its text is noted; ConfigError where the run cannot begin."""
        note(self.text)
        if self.refusal is not None:
            raise ConfigError(self.refusal)
        return self.plan


class Expected(NamedTuple):
    """What the preflight of one rank may take, in bytes."""

    optimiser: float
    states_and_passes: float

    @staticmethod
    def of(plan: MemoryPlan) -> Expected:
        return Expected(plan.states.optimiser, plan.states_and_passes)


def plan_run(config: Config, folder: str, machine: Machine, *, is_local: bool = False) -> Planned:
    """`folder`: of the model, its config.json is enough; `is_local`: nothing is asked of the hub.

    NoShapes where the model's config cannot be read.
    """
    try:
        model = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=is_local
        )
    except (OSError, ValueError) as error:
        raise NoShapes(f"model.name {folder}: {first_line(error)}") from None
    planner = Planner(model, machine)
    made = planner.plan(config)
    text = table(made, config)
    if made.fits:
        return Planned(made, text, None)
    return Planned(made, text, refusal(made, cheapest(planner, config)))


def machine_of(
    config: Config,
    *,
    device: str | None = None,
    memory_gib: float | None = None,
    processes: int = 1,
) -> Machine:
    """This machine, or with `memory_gib` a GPU that is not here and has vLLM, where `auto` leaves
    the engine open. `processes`: that share the weights."""
    kind: Literal["cpu", "cuda"] = "cpu"
    if device == "cuda" or (device is None and (memory_gib or torch.cuda.is_available())):
        kind = "cuda"
    if memory_gib is None:
        num_bytes, engine = device_bytes() if kind == "cuda" else None, engine_kind(config, kind)
    else:
        num_bytes, engine = int(memory_gib * 2**30), config.rollout.engine
        engine = "vllm" if engine == "auto" else engine
    refuse_engine_world_size(config, engine, processes)
    refuse_small_packs(config, processes)
    return Machine(kind, num_bytes, engine, processes)


def device_bytes() -> int:
    """Of this process's GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def resolve_auto(
    config: Config,
    folder: str,
    *,
    device: str,
    note: Callable[[str], None],
    processes: Processes = SINGLE_PROCESS,
) -> tuple[Config, Expected | None]:
    """The config with `auto` resolved, and what rank 0 plans for all, on the smallest GPU.

    ConfigError where the run cannot fit. On a CPU a plan is made only where the preflight asks
    for it.
    """
    if device != "cuda" and not wants_preflight(config, device):
        return config, None
    machine = machine_of(config, device=device, processes=processes.count)
    if machine.num_bytes is not None:
        smallest = -int(processes.all_reduce_max(-machine.num_bytes))
        machine = replace(machine, num_bytes=smallest)

    def plan() -> dict[str, Any]:
        made = plan_run(config, folder, machine).accepted(note)
        resolved = made.config
        sizes = [resolved.microbatch_tokens, resolved.tile_tokens]
        checkpointing = resolved.gradient_checkpointing
        return {"sizes": sizes, "checkpointing": checkpointing, "expected": Expected.of(made)}

    planned = processes.run_on_rank0(plan)
    resolved = with_sizes(config, *planned["sizes"], checkpointing=planned["checkpointing"])
    return resolved, Expected(*planned["expected"])


def wants_preflight(config: Config, device: str) -> bool:
    wanted = {"always": True, "never": False, "auto": device == "cuda"}
    return wanted[config.train.preflight]


# --- what to change where a run does not fit ----------------------------------------------------

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
    if not config.gradient_checkpointing:
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
