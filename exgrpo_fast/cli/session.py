"""What one command does from start to end: a training run, an evaluation, a look at samples."""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from exgrpo_fast.build.data import read_questions
from exgrpo_fast.build.engines import make_endpoint_engine, prepare_engine
from exgrpo_fast.build.environment import environment, quiet_libraries
from exgrpo_fast.build.experience import make_hindsight_prompt
from exgrpo_fast.build.models import load_tokenizer, make_decode, make_policy, start_folder
from exgrpo_fast.build.rewards import make_evaluator, make_rewards
from exgrpo_fast.build.run import open_run
from exgrpo_fast.config import Config, ConfigError, dump_yaml
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.core.heartbeat import Heartbeat
from exgrpo_fast.core.process_group import (
    MainRankFailed,
    Processes,
    RankLost,
    RanksDiverged,
    joined,
)
from exgrpo_fast.core.text import clean_text
from exgrpo_fast.core.torchrun import SINGLE, RankInfo
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import question_from_text
from exgrpo_fast.experience.scoring import Verifier
from exgrpo_fast.model.oom import OutOfMemory
from exgrpo_fast.model.policy import Tokenizer
from exgrpo_fast.rollout.engine import EngineLost, RolloutEngine
from exgrpo_fast.rollout.sync_check import WeightsOutOfSync
from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints, verify
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import HeartbeatScreen, NullScreen, Screen, make_screen
from exgrpo_fast.run.report import write_report
from exgrpo_fast.run.sinks import peak_memory_gib
from exgrpo_fast.training.trainer import Trainer

log = logging.getLogger(__name__)

EXIT_ENGINE_LOST, EXIT_NUMERICAL, EXIT_CANNOT_SAVE, EXIT_SIGNAL = 69, 70, 74, 128
EXIT_OTHERS_FAILED = 1  # where another process has the code that says why


def train_session(
    config: Config,
    folder: RunFolder,
    *,
    device: str,
    resume: str = "never",
    stop_after: int | None = None,
    deterministic: bool = False,
    heartbeat: Heartbeat | None = None,
    place: RankInfo = SINGLE,
    deadline: float | None = None,
) -> int:
    """Train into the run directory; returns the exit code. The caller closes `folder`.

    `place`: among the processes that torchrun has started; `deadline`: in seconds, of what they
    wait for together.
    """
    started = time.perf_counter()
    folder.start_log()
    screen = make_screen() if place.is_main else NullScreen()
    if heartbeat:
        screen = HeartbeatScreen(screen, heartbeat)
        # What the supervisor's SIGABRT leaves behind: the stacks of all threads.
        faulthandler.enable(file=folder.log.open("a"))
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True)
        with joined(place, device, deadline=deadline) as processes:
            return _run(
                config,
                folder,
                screen,
                device=device,
                resume=resume,
                stop_after=stop_after,
                processes=processes,
                started=started,
            )
    except MainRankFailed:
        return EXIT_OTHERS_FAILED
    except RankLost as error:
        log.error("%s", error)
        screen.note(f"stopped: a process of the run is lost ({error}); --resume auto goes on")
        return EXIT_OTHERS_FAILED
    except OutOfMemory as error:
        log.error("%s\n%s", error, error.table)
        screen.note(error.table)
        raise
    except (NumericalStop, WeightsOutOfSync, RanksDiverged) as error:
        log.error("%s", error)
        screen.note(f"stopped: {error}")
        return EXIT_NUMERICAL
    except EngineLost as error:
        log.error("%s", error)
        screen.note(f"stopped: {error}; --resume auto goes on from the last checkpoint")
        return EXIT_ENGINE_LOST
    except CannotSave as error:
        log.error("%s", error)
        screen.note(f"cannot save: {error}")
        return EXIT_CANNOT_SAVE
    finally:
        screen.close()


def _run(
    config: Config,
    folder: RunFolder,
    screen: Screen,
    *,
    device: str,
    resume: str,
    stop_after: int | None,
    processes: Processes,
    started: float,
) -> int:
    resume_from = processes.run_on_rank0(
        lambda: find_checkpoint(folder, resume, screen), pack=as_text, unpack=as_path
    )
    folder.write_text("config.yaml", dump_yaml(config))
    folder.write_json("env.json", environment(device) | {"processes": processes.count})
    prior = config.prior_resampling
    if prior.enabled and prior.model is None:
        made = train_prior(config, folder, screen, device=device, stop_after=stop_after)
        if made.model is None:  # ended early, by a signal or as --stop-after asked
            return made.code
        config = with_section(config, "prior_resampling", model=str(made.model))
    with open_run(
        config, folder, screen, device=device, resume_from=resume_from, processes=processes
    ) as run:
        return _train(config, run.trainer, folder, screen, stop_after, started)


def as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def as_path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _train(
    config: Config,
    trainer: Trainer,
    folder: RunFolder,
    screen: Screen,
    stop_after: int | None,
    started: float,
) -> int:
    processes = trainer.processes
    summary: dict[str, Any] = {"eval_before": None, "eval_after": None}
    summary |= processes.run_on_rank0(lambda: folder.read_json("summary.json"))
    if trainer.num_steps:
        screen.note(f"resumed after step {trainer.num_steps}")
    if trainer.eval_questions and summary["eval_before"] is None:
        summary["eval_before"] = trainer.evaluate().as_dict()
        folder.write_json("summary.json", summary)
        screen.note(headline("before", summary["eval_before"]))
    trainer.train(stop_after=stop_after)
    finished = trainer.num_steps >= trainer.max_steps
    if trainer.eval_questions and finished:
        summary["eval_after"] = trainer.evaluate().as_dict()
        screen.note(headline("after", summary["eval_after"]))
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
    except OSError as error:  # the checkpoint is what counts, and it is written
        screen.note(f"summary.json and report.html: {error}")
    return 0 if trainer.stop_signal is None else EXIT_SIGNAL + trainer.stop_signal


# --- the first of two stages ----------------------------------------------------------------------


class Prior(NamedTuple):
    model: Path | None  # a Hugging Face folder; None where the run is not at its end
    code: int  # its exit code


def train_prior(
    config: Config, folder: RunFolder, screen: Screen, *, device: str, stop_after: int | None
) -> Prior:
    """An on-policy run of this config from the same start, in prior/ of the run directory.

    One that is there is taken as it is, one that was interrupted goes on.
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
            with open_run(stage, inner, screen, device=device, resume_from=resume_from) as run:
                code = _train(stage, run.trainer, inner, screen, stop_after, started)
                if run.trainer.num_steps < stage.train.max_steps:
                    return Prior(None, code)
            screen.note(f"stage 2 of 2: {config.method}, guided by that prior")
        return Prior(_last_checkpoint(inner, stage) / "hf", 0)
    finally:
        inner.close()


def _last_checkpoint(folder: RunFolder, stage: Config) -> Path:
    return folder.checkpoints / f"step_{stage.train.max_steps}"


def prior_config(config: Config, start: str) -> Config:
    """The same run without experience of any kind."""
    steps = config.prior_resampling.prior_steps or config.train.max_steps
    stage = with_section(config, "train", max_steps=steps)
    stage = with_section(stage, "model", name=start)
    for section in ("prior_resampling", "replay", "hindsight"):
        stage = with_section(stage, section, enabled=False)
    return stage.model_copy(update={"method": "on-policy"})


def with_section(config: Config, section: str, **values: Any) -> Config:
    """A config with some values of one section changed."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


# --- what a run says ------------------------------------------------------------------------------


def headline(when: str, evaluation: dict[str, Any]) -> str:
    low, high = evaluation["avg_at_n_low"], evaluation["avg_at_n_high"]
    return (
        f"held-out {when}: avg@{evaluation['n']} {100 * evaluation['avg_at_n']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] on {evaluation['questions']} questions"
    )


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
    if not resume.isdigit() or int(resume) not in checkpoints.steps():
        steps = ", ".join(map(str, checkpoints.steps())) or "none"
        raise ConfigError(f"--resume {resume}: expected auto, never or one of the steps: {steps}")
    path = folder.checkpoints / f"step_{resume}"
    verify(path)
    return path


# --- looking at a model ---------------------------------------------------------------------------


def model_config(
    model: str,
    *,
    engine: str,
    reward: str,
    prompt_field: str,
    answer_field: str,
    max_completion_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    n: int,
    ks: Sequence[int],
) -> Config:
    """The part of a training config that evaluation and sampling need."""
    from exgrpo_fast.config import validate

    longest = 4096 + max_completion_tokens
    return validate(
        {
            "model": {"name": model},
            "data": {
                "prompt_field": prompt_field,
                "answer_field": answer_field,
                "max_prompt_tokens": 4096,
            },
            "reward": {"functions": [reward]},
            "rollout": {"engine": engine, "max_completion_tokens": max_completion_tokens},
            "train": {"seed": seed, "max_tokens_per_microbatch": longest},
            "eval": {"n": n, "k": list(ks), "temperature": temperature, "top_p": top_p},
        }
    )


def eval_session(
    model: str,
    files: Sequence[str],
    *,
    n: int,
    ks: Sequence[int],
    revise: int = 0,
    device: str,
    endpoint: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """file -> its evaluation; `revise` rounds in which failed responses are written again.

    `endpoint`: url, model and key_env of a vLLM server that generates; no weights are loaded here.
    """
    quiet_libraries()
    config = model_config(model, n=n, ks=ks, **options)
    screen = make_screen(sys.stderr)  # what is asked for goes to stdout alone
    tokenizer = load_tokenizer(model)
    loaded = {file: read_questions(config, file, tokenizer, screen).questions for file in files}
    try:
        with make_rewards(config) as rewards, ExitStack() as stack:
            engine = make_engine(
                config,
                tokenizer,
                some_prompt(loaded),
                device=device,
                stack=stack,
                endpoint=endpoint,
            )
            verifier = Verifier(rewards, make_decode(tokenizer), screen)
            prompt = make_hindsight_prompt(config, rewards, tokenizer) if revise else None
            evaluator = make_evaluator(
                config, engine, verifier, screen, prompt=prompt, revisions=revise
            )
            return {file: evaluator(questions).as_dict() for file, questions in loaded.items()}
    finally:
        screen.close()


def make_engine(
    config: Config,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    device: str,
    stack: ExitStack,
    endpoint: Mapping[str, Any] | None,
) -> RolloutEngine:
    """The model that is looked at, loaded here or behind an endpoint; `prompt_ids`: any prompt."""
    model = config.model.name or ""
    if endpoint is not None:
        return make_endpoint_engine(model, tokenizer, **endpoint)
    prepared = prepare_engine(config, model, tokenizer, device=device, stack=stack)
    return prepared.attach(make_policy(config, model, device=device), prompt_ids)


def some_prompt(loaded: Mapping[str, Sequence[Question]]) -> tuple[int, ...]:
    return next(question.prompt_ids for found in loaded.values() for question in found)


def sample_session(
    model: str,
    *,
    data: str | None,
    row: int,
    prompt: str | None,
    n: int,
    device: str,
    endpoint: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Print n completions of one question, with reward, length and mean log-prob."""
    quiet_libraries()
    config = model_config(model, n=n, ks=[1], **options)
    screen = make_screen(sys.stderr)  # what is asked for goes to stdout alone
    tokenizer = load_tokenizer(model)
    if data is None:
        question = question_from_text(prompt or "", tokenizer=tokenizer)
    else:
        questions = read_questions(config, data, tokenizer, screen).questions
        if not 0 <= row < len(questions):
            raise ConfigError(f"--row {row}: {data} has questions 0 to {len(questions) - 1}")
        question = questions[row]
    try:
        with make_rewards(config) as rewards, ExitStack() as stack:
            engine = make_engine(
                config,
                tokenizer,
                question.prompt_ids,
                device=device,
                stack=stack,
                endpoint=endpoint,
            )
            decode = make_decode(tokenizer)
            evaluator = make_evaluator(config, engine, Verifier(rewards, decode, screen), screen)
            samples = evaluator.sample([question])
    finally:
        screen.close()
    print(clean_text(f"question  {question.prompt}\nanswer    {question.answer or '(none given)'}"))
    for sample in samples:
        completion = sample.completion
        judged = f"reward {sample.verdict.reward:g} ({sample.verdict.reason})"
        figures = (
            f"{len(completion.token_ids)} tokens, mean log-prob {completion.logprobs.mean():.3f}"
        )
        print(f"\n--- {judged if question.answer else 'no answer to compare with'}, {figures}")
        print(clean_text(sample.text))
