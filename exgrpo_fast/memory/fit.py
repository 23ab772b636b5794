"""The memory plan of a run before its weights are loaded, on this machine or another GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig

from exgrpo_fast.config import (
    Config,
    ConfigError,
    engine_kind,
    refuse_engine_world_size,
    refuse_small_packs,
)
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.text import first_line
from exgrpo_fast.memory.advice import cheapest, refusal
from exgrpo_fast.memory.planner import Machine, MemoryPlan, Planner, table, with_sizes


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
        sizes = [made.config.microbatch_tokens, made.config.tile_tokens]
        return {"sizes": sizes, "expected": Expected.of(made)}

    planned = processes.run_on_rank0(plan)
    return with_sizes(config, *planned["sizes"]), Expected(*planned["expected"])


def wants_preflight(config: Config, device: str) -> bool:
    wanted = {"always": True, "never": False, "auto": device == "cuda"}
    return wanted[config.train.preflight]
