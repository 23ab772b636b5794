"""The memory plan of a run before its weights are loaded: of this machine, or of one to be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoConfig

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.engines import engine_kind
from exgrpo_fast.memory.advice import cheapest, refusal
from exgrpo_fast.memory.plan import Machine, MemoryPlan, Planner, table


class NoShapes(ConfigError):
    """The model's config cannot be read: not there, or not reachable from here."""


@dataclass(frozen=True)
class Planned:
    """A plan as text, and why the run cannot begin, if it cannot."""

    plan: MemoryPlan
    text: str
    refusal: str | None


def plan_run(
    config: Config,
    folder: str,
    *,
    device: str | None,
    memory_gib: float | None = None,
    is_local: bool = False,
) -> Planned:
    """`folder`: of the model, its config.json is enough; `memory_gib`: of a GPU that is not here;
    `is_local`: nothing is asked of the hub.

    NoShapes where the model's config cannot be read.
    """
    try:
        model = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=is_local
        )
    except (OSError, ValueError) as error:
        raise NoShapes(f"model.name {folder}: {str(error).splitlines()[0]}") from None
    planner = Planner(model, machine(config, device, memory_gib))
    made = planner.plan(config)
    text = table(made, config)
    if made.fits:
        return Planned(made, text, None)
    return Planned(made, text, refusal(made, cheapest(planner, config)))


def machine(config: Config, device: str | None, memory_gib: float | None) -> Machine:
    """With `memory_gib` a GPU that has vLLM, where `auto` leaves the engine open."""
    kind: Literal["cpu", "cuda"] = "cpu"
    if device == "cuda" or (device is None and (memory_gib or torch.cuda.is_available())):
        kind = "cuda"
    if memory_gib is not None:
        engine = config.rollout.engine
        return Machine(kind, int(memory_gib * 2**30), "vllm" if engine == "auto" else engine)
    num_bytes = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else None
    return Machine(kind, num_bytes, engine_kind(config, kind))


def fitted(
    config: Config, folder: str, *, device: str, note: Callable[[str], None]
) -> tuple[Config, MemoryPlan | None]:
    """The config with what `auto` comes to, and the plan; ConfigError where the run cannot fit.

    On a CPU a plan is made only where the preflight asks for it.
    """
    if device != "cuda" and not wants_preflight(config, device):
        return config, None
    planned = plan_run(config, folder, device=device)
    note(planned.text)
    if planned.refusal is not None:
        raise ConfigError(planned.refusal)
    return planned.plan.config, planned.plan


def wants_preflight(config: Config, device: str) -> bool:
    wanted = {"always": True, "never": False, "auto": device == "cuda"}
    return wanted[config.train.preflight]
