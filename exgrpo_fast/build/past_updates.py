"""`train --from-rollouts`: train on what the steps of a finished run trained on, without an engine.

The weights and the optimiser are those of the checkpoint before the first step, so that with nothing
changed every loss is the run's, bit for bit. Learning rate, optimiser and objective may be changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exgrpo_fast.build.assembly import make_advantages, make_learner, make_objective
from exgrpo_fast.build.environment import prepare_process, use_deterministic_algorithms
from exgrpo_fast.build.folder import check_teacher
from exgrpo_fast.build.models import adapter_of, make_policy, make_reference
from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.config import Config
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.rng import restore_random_state, seed_everything
from exgrpo_fast.core.types import Group
from exgrpo_fast.memory.fit import resolve_auto
from exgrpo_fast.model.folder_reading import model_files
from exgrpo_fast.model.hf_folder import HuggingFaceFolder
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.sinks import JsonlSink
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.saved_updates import read_update, saved_steps
from exgrpo_fast.training.step_metrics import float32_hex
from exgrpo_kernels import PolicyObjective


@dataclass(frozen=True)
class PastRun:
    """A run directory with updates/, and the first and last step to train on again."""

    folder: Path
    config: Config  # as it ran
    first: int
    last: int

    @property
    def updates(self) -> Path:
        return self.folder / "updates"

    def check(self) -> None:
        """UserError for steps that were not saved or begin where there are no weights."""
        there = saved_steps(self.updates)
        if not there:
            raise UserError(
                f"--from-rollouts {self.folder}: the run kept nothing to train on; "
                f"its log.updates has to be true"
            )
        missing = [step for step in range(self.first, self.last + 1) if step not in there]
        if missing:
            raise UserError(
                f"--steps {self.first}:{self.last}: step {missing[0]} was not kept; there are "
                f"{there[0]} to {there[-1]}"
            )
        if self.first > 1 and not self.checkpoint.is_dir():
            names = (path.name[5:] for path in self.checkpoint.parent.glob("step_*"))
            starts = [1, *sorted(int(name) + 1 for name in names if name.isdecimal())]
            raise UserError(
                f"--steps {self.first}:{self.last}: there is no checkpoint of step "
                f"{self.first - 1}; steps can begin with {', '.join(map(str, starts))}"
            )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"step_{self.first - 1}"

    @property
    def start(self) -> str:
        """The folder of the policy that the run began with."""
        if self.config.model.name == "quickstart":
            return str(self.folder / "warm_start")
        return model_folder(self.config.model.name or "", Screen())

    def losses(self) -> dict[int, str]:
        """step -> the run's own loss, as `loss_hex`."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return {step["step"]: step["loss_hex"] for step in map(json.loads, lines)}


def train_again(
    past: PastRun, config: Config, out: RunFolder, *, device: str, deterministic: bool = False
) -> Iterator[dict[str, Any]]:
    """The metrics of each step, logged to `out`; behind the last one its hf/ holds the weights."""
    sink = JsonlSink(out.metrics)
    prepare_process(device)
    if deterministic:
        use_deterministic_algorithms()
    resume_from = past.checkpoint if past.first > 1 else None
    if resume_from:
        verify(resume_from)
    start = past.start
    files = model_files(start)
    check_teacher(config, files)
    seed_everything(config.train.seed)
    config, _ = resolve_auto(config, start, device=device, note=lambda line: None)
    adapter = adapter_of(config, resume_from)
    name = start if adapter or not resume_from else str(resume_from / "hf")
    policy = make_policy(config, name, device=device, adapter=adapter)
    learner = make_learner(config, policy, make_reference(config, start, policy))
    if resume_from:
        state = load_state(resume_from)
        learner.load_state_dict(state["learner"])
        restore_random_state(state["random"])
    losses = past.losses()
    for step in range(past.first, past.last + 1):
        groups, objective = read_update(past.updates, step)
        metrics = _step(step, learner, groups, objective, past, config)
        metrics["run_loss_hex"] = losses.get(step)
        sink.log(step, metrics)
        yield metrics
    folder = HuggingFaceFolder(policy, files.tokenizer)
    folder.write(out.path / "hf", folder.tensors())


def _step(
    step: int,
    learner: Learner,
    groups: list[Group],
    objective: PolicyObjective,
    past: PastRun,
    config: Config,
) -> dict[str, Any]:
    rule = make_advantages(config)
    if rule_keys(config) != rule_keys(past.config):
        groups = [rule.apply(group) for group in groups]
    report = learner.update(groups, changed_objective(objective, past.config, config))
    return {
        "step": step,
        "loss": report.loss,
        "loss_hex": float32_hex(report.loss),
        "grad_norm": max(report.grad_norms, default=None),
        "lr": report.lr,
        "tokens_trained": report.tokens_trained,
    }


def rule_keys(config: Config) -> tuple[object, ...]:
    """What decides the advantages of a group."""
    algorithm = config.algorithm
    return algorithm.advantage, algorithm.std, algorithm.quantile


def changed_objective(saved: PolicyObjective, before: Config, now: Config) -> PolicyObjective:
    """The saved loss with what the config has changed; what replay set (no clip) stays."""
    old, new = asdict(make_objective(before)), asdict(make_objective(now))
    return replace(saved, **{name: new[name] for name in new if new[name] != old[name]})


FREE = ("train.", "algorithm.", "log.", "eval.", "checkpoint.")
# They decided what was generated, rewarded or stored.
FIXED = ("train.seed", "train.max_steps", "algorithm.overlong.", "algorithm.mismatch.")


def refuse_fixed(before: Mapping[str, Any], now: Mapping[str, Any], config: Config) -> None:
    """UserError for a changed key that cannot change what was already generated, and for runs whose
    updates draw random numbers of the generation's stream."""
    for key in now:
        fixed = not key.startswith(FREE) or key.startswith(FIXED)
        if fixed and before.get(key) != now[key]:
            raise UserError(
                f"--{key}: it decided what was generated or rewarded; --from-rollouts changes "
                f"train and algorithm alone"
            )
    if config.model.lora is not None and config.model.lora.dropout > 0:
        raise UserError("--from-rollouts: model.lora.dropout draws anew; set it to 0 in the run")
    regrouped = any(before[f"algorithm.{k}"] != now[f"algorithm.{k}"] for k in ("advantage", "std", "quantile"))  # fmt: skip
    if regrouped and config.replay.enabled and config.replay.mixer == "fifo":
        raise UserError(
            "--algorithm.advantage: replay.mixer fifo keeps the advantages of another time; they "
            "cannot be computed anew"
        )
