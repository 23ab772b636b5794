"""`train(...)`: a run from Python."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exgrpo_fast.api.inputs import Reward, Rows, as_references, as_source, make_config
from exgrpo_fast.cli.arguments import (
    check_before_torch,
    check_inputs,
    choose_device,
    require_tokenizer,
)
from exgrpo_fast.config import Config, refuse_other_config, refuse_world_size
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.torchrun import place_of, refuse_missing_address
from exgrpo_fast.rewards.loading import stop_where_imported
from exgrpo_fast.run.directory import GuestFolder, RunFolder


class RunStopped(UserError):
    """A run that ended before its last step; `code` is the exit code of the command."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TrainedRun:
    """A run directory that a call of `train` has written."""

    path: Path
    finished: bool  # False after Ctrl-C, SIGTERM or `stop_after`; `resume="auto"` goes on

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step; docs/metrics.md has the names. `pandas.DataFrame(run.metrics)` is a table."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def summary(self) -> dict[str, Any]:
        """Evaluation before and after, wall time, peak memory."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @property
    def checkpoint(self) -> Path | None:
        """The newest Hugging Face folder."""
        steps = (self.path / "checkpoints").glob("step_*/hf")
        return max(steps, key=lambda hf: int(hf.parent.name.removeprefix("step_")), default=None)

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def train(
    model: str | None = None,
    train: Rows | None = None,
    reward: Reward | Sequence[Reward] | None = None,
    *,
    recipe: str | Config = "exgrpo",
    eval: Rows | None = None,
    out: str | Path = "runs/python",
    resume: str = "never",
    stop_after: int | None = None,
    deterministic: bool = False,
    device: str | None = None,
    **keys: Any,
) -> TrainedRun:
    """Train `model` on `train` and return the run.

    model    a folder, a hub name, a .gguf file, or `smollm2`
    train    rows (dicts with a question and an answer), a datasets.Dataset, a file, a hub name
    reward   a name, `file.py:function`, a function with TRL's signature, or several of them
    recipe   a recipe's name, a YAML file, or a Config
    eval     held-out rows, evaluated before and after
    out      the run directory; `resume="auto"` goes on in it
    keys     config values by the last word of their key (`lr=1e-6`, `group_size=8`), or a section
             with a dict (`replay={"enabled": False}`)

    Errors: UserError in one line for a mistake, before weights are loaded; RunStopped where a run
    ends in an error (exit codes of docs/cli.md).
    """
    stop_where_imported()
    out, rank = Path(out), place_of()
    values = dict(keys)
    inputs = out / "inputs"
    if model is not None:
        values["model.name"] = str(model)
    for key, rows in (("train", train), ("eval", eval)):
        if rows is not None:
            values[f"data.{key}"] = as_source(rows, inputs / f"{key}.jsonl")
    if reward is not None:
        values["reward.functions"] = as_references(reward, inputs)
    config = make_config(recipe, values)
    refuse_missing_address()
    refuse_world_size(config, rank.count)
    rows = check_inputs(config, device=device)
    require_tokenizer(str(config.model.name), "model.name")
    resumes = resume != "never"
    folder = RunFolder(out, resume=resumes) if rank.is_main else GuestFolder(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(folder))
        checkpoint = None
        if resumes:
            refuse_other_config(folder.config, config)
            checkpoint = folder.checkpoint_of(resume)
        rewards = None
        if rank.is_main:
            rewards = check_before_torch(
                config, rows, weights=not resumes, trains=True, checkpoint=checkpoint
            )
        stack.enter_context(rewards or contextlib.nullcontext())
        from exgrpo_fast.cli.train_run import EXIT_SIGNAL, train_run

        code = train_run(
            config,
            folder,
            device=choose_device(device, config),
            resume=resume,
            stop_after=stop_after,
            deterministic=deterministic,
            rank=rank,
            rewards=rewards,
        )
    if code and code < EXIT_SIGNAL:
        raise RunStopped(f"the run stopped with code {code}: {out}/run.log has the cause", code)
    run = TrainedRun(out, finished=False)
    done = run.metrics[-1]["step"] if run.metrics else 0
    return TrainedRun(out, finished=done >= config.train.max_steps)
