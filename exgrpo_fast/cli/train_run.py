"""The body of `exgrpo-fast train`: a training run from its checkpoint to its exit code."""

from __future__ import annotations

import faulthandler
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from exgrpo_fast import __version__
from exgrpo_fast.build.environment import use_deterministic_algorithms
from exgrpo_fast.build.models import start_folder
from exgrpo_fast.build.run import open_run
from exgrpo_fast.cli.machine import collect
from exgrpo_fast.config import Config, dump_yaml, with_values
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.core.process_group import (
    COLLECTIVE_SECONDS,
    MainRankFailed,
    RankLost,
    RanksDiverged,
    joined,
)
from exgrpo_fast.core.text import clean_line
from exgrpo_fast.core.torchrun import SINGLE, RankInfo
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.rollout.engine import EngineLost
from exgrpo_fast.rollout.sync_check import WeightsOutOfSync
from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.display.live import make_screen
from exgrpo_fast.run.rank_watch import watched_ranks
from exgrpo_fast.run.report import write_report
from exgrpo_fast.run.supervisor import DEADLINE_SECONDS, PATIENCE
from exgrpo_fast.training.step_metrics import peak_memory_gib
from exgrpo_fast.training.trainer import Trainer

log = logging.getLogger(__name__)

EXIT_SIGNAL = 128
# What ends a run early: its exit code, and the line on the screen.
STOPS: dict[type[Exception], tuple[int, str]] = {
    RankLost: (1, "stopped: a process of the run is lost ({}); --resume auto goes on"),
    EngineLost: (69, "stopped: {}; --resume auto goes on from the last checkpoint"),
    NumericalStop: (70, "stopped: {}"),
    WeightsOutOfSync: (70, "stopped: {}"),
    RanksDiverged: (70, "stopped: {}"),
    CannotSave: (74, "cannot save: {}"),
}


def train_run(
    config: Config,
    folder: RunFolder,
    *,
    device: str,
    resume: str = "never",
    stop_after: int | None = None,
    deterministic: bool = False,
    supervised: bool = False,
    rank: RankInfo = SINGLE,
    deadline: float = DEADLINE_SECONDS,
    rewards: RewardPool | None = None,
) -> int:
    """Train into the run directory; returns the exit code. The caller closes `folder`.

    `deadline`: seconds of silence after which a rank of several hangs. `rewards`: as in `open_run`.
    """
    started = time.perf_counter()
    folder.start_log()
    screen = make_screen() if rank.is_main else Screen()
    if supervised:
        # On the supervisor's SIGABRT: the stacks of all threads.
        faulthandler.enable(file=folder.log.open("a"))
    try:
        if deterministic:
            use_deterministic_algorithms()
        patience = max(COLLECTIVE_SECONDS, PATIENCE["start"] * deadline)
        with (
            joined(rank, device, deadline=patience) as processes,
            watched_ranks(processes, deadline=deadline, log=folder.append_to_log),
        ):
            found = processes.run_on_rank0(
                lambda: find_checkpoint(folder, resume, screen),
                pack=lambda path: path and str(path),
            )
            folder.write_text("config.yaml", dump_yaml(config))
            folder.write_json("env.json", environment(device) | {"processes": processes.count})
            if config.prior_resampling.enabled and config.prior_resampling.model is None:
                prior = train_prior(config, folder, screen, device=device, stop_after=stop_after)
                if prior.model is None:  # ended early, by a signal or as --stop-after asked
                    return prior.exit_code
                config = with_values(config, {"prior_resampling.model": str(prior.model)})
            with open_run(
                config,
                folder,
                screen,
                device=device,
                resume_from=found and Path(found),
                processes=processes,
                rewards=rewards,
            ) as trainer:
                return train_and_evaluate(config, trainer, folder, screen, stop_after, started)
    except MainRankFailed:  # rank 0 reports the cause
        return 1
    except OutOfMemory as error:
        log.error("%s\n%s", error, error.table)
        screen.note(error.table)
        raise
    except tuple(STOPS) as error:
        log.error("%s", error)
        code, line = next(STOPS[kind] for kind in STOPS if isinstance(error, kind))
        screen.note(line.format(error))
        return code
    finally:
        screen.close()


def environment(device: str) -> dict[str, Any]:
    """env.json: versions and devices, without which the figures of a run say little."""
    return {"exgrpo_fast": __version__, "device": device, **collect()}


def train_and_evaluate(
    config: Config,
    trainer: Trainer,
    folder: RunFolder,
    screen: Screen,
    stop_after: int | None,
    started: float,
) -> int:
    """Evaluate, train to the end or `stop_after` steps, evaluate, write summary and report."""
    processes = trainer.processes
    summary: dict[str, Any] = {"eval_before": None, "eval_after": None}
    summary |= processes.run_on_rank0(lambda: folder.read_json("summary.json"))
    if trainer.num_steps:
        screen.note(f"resumed after step {trainer.num_steps}")
    if trainer.eval_questions and summary["eval_before"] is None:
        summary["eval_before"] = trainer.evaluate().as_dict()
        folder.write_json("summary.json", summary)
        screen.note(headline("before", summary["eval_before"]))
        show_examples(summary["eval_before"], screen)
    trainer.train(stop_after=stop_after)
    finished = trainer.num_steps >= trainer.max_steps
    if trainer.eval_questions and finished:
        summary["eval_after"] = trainer.evaluate().as_dict()
        screen.note(headline("after", summary["eval_after"]))
        show_examples(summary["eval_after"], screen)
        screen.note(gain(summary["eval_before"], summary["eval_after"]))
    summary |= {
        "method": config.replay.method if config.replay.enabled else config.method,
        "steps": trainer.num_steps,
        "wall_seconds": summary.get("wall_seconds", 0.0) + time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(trainer.learner.policy.device),
    }
    try:
        folder.write_json("summary.json", summary)
        if processes.is_main:
            screen.note(f"report: {write_report(folder.path)}")
    except OSError as error:  # no reason to fail: the checkpoint is written
        screen.note(f"summary.json and report.html: {error}")
    return 0 if trainer.stop_signal is None else EXIT_SIGNAL + trainer.stop_signal


# --- the prior policy, where EAPO has none yet ----------------------------------------------------


class Prior(NamedTuple):
    model: Path | None  # a Hugging Face folder; None where its run has not finished
    exit_code: int


def train_prior(
    config: Config, folder: RunFolder, screen: Screen, *, device: str, stop_after: int | None
) -> Prior:
    """An on-policy run of this config from the same weights, in prior/ of the run directory.

    A finished one is reused, an interrupted one is resumed.
    """
    started = time.perf_counter()
    start = start_folder(config, folder, screen, device=device)
    stage = prior_config(config, start)
    inner = RunFolder(folder.path / "prior", resume=True)
    try:
        resume_from = find_checkpoint(inner, "auto", screen)
        if resume_from != _last_checkpoint(inner, stage):
            inner.config.write_text(dump_yaml(stage))
            screen.note(f"stage 1 of 2: the prior, {stage.train.max_steps} steps on-policy")
            with open_run(stage, inner, screen, device=device, resume_from=resume_from) as trainer:
                code = train_and_evaluate(stage, trainer, inner, screen, stop_after, started)
                if trainer.num_steps < stage.train.max_steps:
                    return Prior(None, code)
            screen.note(f"stage 2 of 2: {config.method}, guided by that prior")
        return Prior(_last_checkpoint(inner, stage) / "hf", 0)
    finally:
        inner.close()


def _last_checkpoint(folder: RunFolder, stage: Config) -> Path:
    return folder.checkpoints / f"step_{stage.train.max_steps}"


def prior_config(config: Config, start: str) -> Config:
    """The same run on-policy."""
    values = {
        "method": "on-policy",
        "model.name": start,
        "train.max_steps": config.prior_resampling.prior_steps or config.train.max_steps,
    }
    sections = ("prior_resampling", "replay", "hindsight")
    return with_values(config, values | {f"{name}.enabled": False for name in sections})


# --- checkpoint and screen ------------------------------------------------------------------------


def headline(when: str, evaluation: dict[str, Any]) -> str:
    low, high = evaluation["avg_at_n_low"], evaluation["avg_at_n_high"]
    return (
        f"held-out {when}: avg@{evaluation['n']} {100 * evaluation['avg_at_n']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] on {evaluation['questions']} questions"
    )


def show_examples(evaluation: dict[str, Any], screen: Screen) -> None:
    """A line each: '  What is 1 + 2? -> It is 3. (reward 1)'."""
    for example in evaluation.get("examples", []):
        asked, said = (clean_line(example[key], max_line=160) for key in ("question", "completion"))
        screen.note(f"  {asked} -> {said} (reward {example['reward']:g})")


def gain(before: dict[str, Any], after: dict[str, Any]) -> str:
    points = 100 * (after["avg_at_n"] - before["avg_at_n"])
    return f"held-out change: {points:+.1f} points of avg@{after['n']}"


def find_checkpoint(folder: RunFolder, resume: str, screen: Screen) -> Path | None:
    """'never' -> None, 'auto' -> the newest that verifies, a number -> that step or an error."""
    if resume == "never":
        return None
    checkpoints = Checkpoints(folder.checkpoints)
    if resume == "auto":
        return checkpoints.newest_valid(lambda why: screen.note(f"checkpoint passed over: {why}"))
    path = folder.checkpoint_of(resume)
    if path is not None:
        verify(path)
    return path
