"""A training run: what a user's mistake can break (files, rewards, gold answers) is checked before the
weights are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exgrpo_fast.build.assembly import make_trainer, open_sink
from exgrpo_fast.build.data import load_data, refuse_bad_golds
from exgrpo_fast.build.engines import build_engine, reserve_engine
from exgrpo_fast.build.environment import prepare_process
from exgrpo_fast.build.experience import make_prior
from exgrpo_fast.build.folder import check_folder, check_prior, check_teacher, refuse_too_long
from exgrpo_fast.build.forward import prove_forward
from exgrpo_fast.build.models import (
    adapter_of,
    make_policy,
    make_reference,
    refuse_broken_weights,
    refuse_impossible_attention,
    start_folder,
)
from exgrpo_fast.build.rewards import check_rewards, make_rewards
from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes, host_mesh
from exgrpo_fast.core.rng import seed_everything
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.experience.replay.source import ReplaySource
from exgrpo_fast.memory.budgets import store_note
from exgrpo_fast.memory.fit import Expected, resolve_auto, wants_preflight
from exgrpo_fast.model.folder_reading import Tokenizer, model_files
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.run.checkpoint.manifest import read_manifest
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.preflight import rehearse
from exgrpo_fast.training.trainer import Trainer


@contextlib.contextmanager
def open_run(
    config: Config,
    folder: RunFolder,
    screen: Screen,
    *,
    device: str,
    resume_from: Path | None,
    processes: Processes = SINGLE_PROCESS,
    rewards: RewardPool | None = None,
) -> Iterator[Trainer]:
    """The trainer of a run; leaving the block closes its reward workers, engine and metric sinks.

    Rank 0 alone has the reward workers, the engine and the files. `rewards`: workers that run
    already and were tried on a row of the data.
    """
    prepare_process(device)
    refuse_impossible_attention(config, device)
    with contextlib.ExitStack() as stack:
        are_tried = rewards is not None
        if processes.is_main:
            rewards = stack.enter_context(rewards or make_rewards(config))
        start, tokenizer = open_model_folder(
            config, folder, screen, device=device, processes=processes
        )
        train, held_out = load_data(config, tokenizer, screen)
        questions = [*train, *held_out]
        processes.run_on_rank0(lambda: are_tried or check_rewards(config, rewards, train[0]))
        refuse_too_long(config, start, longest_prompt=max(len(q.prompt_ids) for q in questions))
        if config.data.check_answers:
            processes.run_on_rank0(lambda: refuse_bad_golds(questions, rewards, screen))
        if resume_from:
            refuse_other_tokenizer(resume_from, tokenizer)

        seed_everything(config.train.seed)
        config, expected = resolve_auto(
            config, start, device=device, note=screen.note, processes=processes
        )
        weights = str(resume_from / "hf") if resume_from else start
        reserved = stack.enter_context(
            reserve_engine(
                config,
                weights,
                tokenizer,
                device=device,
                processes=processes,
                log_folder=folder.path,
                note=screen.note,
            )
        )
        policy = open_policy(config, start, resume_from, device=device, processes=processes)
        state = load_state(resume_from, mesh=host_mesh(processes)) if resume_from else None
        num_steps = state["num_steps"] if state else 0
        engine = build_engine(
            config,
            policy,
            tokenizer,
            reserved,
            prompt_ids=train[0].prompt_ids,
            journal=folder.rollouts,
            version=num_steps,
        )
        sink = stack.enter_context(
            contextlib.closing(open_sink(config, folder, screen, num_steps, processes))
        )
        trainer = make_trainer(
            config,
            policy=policy,
            reference=make_reference(config, start, policy),
            engine=engine,
            prior=make_prior(config, policy, tokenizer, engine, reserved.vllm_prior),
            rewards=rewards,
            train=train,
            held_out=held_out,
            tokenizer=tokenizer,
            folder=folder,
            screen=screen,
            sink=sink,
        )
        if state:
            restore_run(trainer, state)
        rehearse_and_check(config, trainer, tokenizer, train[0], expected)
        yield trainer


def open_model_folder(
    config: Config, folder: RunFolder, screen: Screen, *, device: str, processes: Processes
) -> tuple[str, Tokenizer]:
    """(folder of the model that the run starts from, its tokenizer); UserError where the folder,
    the prior or the teacher do not go with the config."""
    start = processes.run_on_rank0(lambda: start_folder(config, folder, screen, device=device))
    files = model_files(start)
    for line in processes.run_on_rank0(lambda: check_folder(config, start, files.tokenizer)):
        screen.note(line)
    check_prior(config, files)
    check_teacher(config, files)
    return start, files.tokenizer


def refuse_other_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """ConfigError where the checkpoint was written with another vocabulary."""
    origin = read_manifest(checkpoint)["origin"]
    if origin and origin["tokenizer"] != fingerprint(tokenizer.get_vocab()):
        raise ConfigError(
            f"--resume: {checkpoint} was made with another tokenizer ({origin['vocabulary_size']} "
            f"tokens) than model.name has ({len(tokenizer)} tokens)"
        )


def open_policy(
    config: Config, start: str, resume_from: Path | None, *, device: str, processes: Processes
) -> Policy:
    """With the weights of `start` or of the checkpoint; a checkpoint's adapter lies on `start`."""
    path = str(resume_from / "hf") if resume_from else start
    adapter = adapter_of(config, resume_from)
    policy = make_policy(
        config, start if adapter else path, device=device, adapter=adapter, processes=processes
    )
    refuse_broken_weights(policy, path)
    return policy


def rehearse_and_check(
    config: Config,
    trainer: Trainer,
    tokenizer: Tokenizer,
    question: Question,
    expected: Expected | None,
) -> None:
    """Before the first step: the preflight, the engine's weights, and the check of every forward pass."""
    policy, engine, screen = trainer.learner.policy, trainer.engine, trainer.screen
    device = policy.device.type
    if expected is not None and wants_preflight(config, device):
        screen.note(run_preflight(config, trainer, expected))
    if device == "cuda" and config.optimizer != "adamw":
        screen.note(f"the first update tunes or compiles {config.optimizer}: it is slow")
    engine.sync(trainer.num_steps)
    with screen.phase("check the forward pass"):
        found = prove_forward(config, policy, engine, tokenizer, question.prompt_ids)
    screen.note(found)
    if isinstance(trainer.replay, ReplaySource):
        screen.note(store_note(trainer.replay.store.plan, device))


def run_preflight(config: Config, trainer: Trainer, expected: Expected) -> str:
    """Run the largest possible step once; DoesNotFit where the device is too small."""
    rehearsal = rehearse(
        trainer.learner,
        trainer.objective,
        prompt_tokens=config.longest_prompt,
        completion_tokens=config.rollout.max_completion_tokens,
        state_bytes=expected.optimiser,
        processes=trainer.processes.count,
    )
    if trainer.learner.policy.device.type != "cuda":
        return rehearsal.note()  # on a CPU the plan does not cover the process as a whole
    return rehearsal.note(expected.states_and_passes)


def restore_run(trainer: Trainer, state: dict[str, Any]) -> None:
    """ConfigError where the config or the data no longer fit what was saved."""
    if trainer.generate_ahead:  # restoring asks servers that may have other weights
        trainer.engine.sync(state["num_steps"])
    try:
        trainer.load_state_dict(state)
    except ValueError as error:
        raise ConfigError(f"--resume: {error}") from None
    trainer.writer.committed = trainer.num_steps
