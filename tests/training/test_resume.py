"""A run that is stopped and taken up again is the run that was never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from conftest import OwnEngine, make_questions

from exgrpo_fast.core.rng import random_state, restore_random_state, seed_everything
from exgrpo_fast.rollout.engine import UNOBSERVED
from exgrpo_fast.rollout.journal import JournalledEngine
from exgrpo_fast.run.checkpoint.format import load_state, split_tensors
from exgrpo_fast.training.trainer import Trainer

STEPS = 14
# 12 questions, 4 a step: epochs end after steps 3, 6, 9, ... when replay asks none of them again.
# The store is full from step 4 on, and the rate grows up to step 6.
SETTINGS: dict[str, Any] = {
    "function": "even_length",
    "replay": {
        "enabled": True,
        "start_success_rate": 0.0,
        "retire": False,
        "store": {"max_per_question": 1},
    },
    "train": {"minibatches": 2, "lr": 1e-3, "warmup_steps": 6, "max_steps": STEPS},
}


@pytest.fixture
def make(tokenizer, make_test_trainer):
    def make_one() -> Trainer:
        questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])
        trainer = make_test_trainer(questions, **SETTINGS)
        for layer in trainer.learner.policy.model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # draws from torch's process-wide state
        return trainer

    return make_one


def digest(trainer: Trainer) -> str:
    """Of weights, moments, store and cursors."""
    plain, tensors = split_tensors(trainer.state_dict())
    hasher = xxhash.xxh3_128(repr(plain).encode())
    weights = trainer.learner.policy.model.state_dict()
    for name, tensor in {**tensors, **weights}.items():
        hasher.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def restore_run(trainer: Trainer, path: Path) -> None:
    model: Any = trainer.learner.policy.model
    model.load_state_dict(type(model).from_pretrained(path / "hf").state_dict())
    trainer.load_state_dict(load_state(path))


def test_any_step_can_be_the_last_before_a_resume(make) -> None:
    whole = make()
    seed_everything(0)
    paths, losses, digests = [whole.save()], [], [digest(whole)]
    whole.checkpoints.keep = STEPS + 1
    metrics: list[dict[str, Any]] = []
    for _ in range(STEPS):
        metrics.append(whole.step()[1])
        paths.append(whole.save())
        losses.append(metrics[-1]["loss_hex"])
        digests.append(digest(whole))
    assert len(set(losses)) == STEPS
    assert sum(m["replay_evicted"] > 0 for m in metrics) > 3, "the store let go of nothing"
    assert whole.stream.state_dict()["epoch"] >= 2 and whole.learner.optimiser.num_updates > 6
    for step in range(STEPS):
        resumed = make()
        seed_everything(99)  # what another process has drawn
        restore_run(resumed, paths[step])
        assert digest(resumed) == digests[step]
        for later in range(step, min(step + 2, STEPS)):
            assert resumed.step()[1]["loss_hex"] == losses[later], (step, later)
        assert digest(resumed) == digests[min(step + 2, STEPS)]


class Counting(OwnEngine):
    """Counts the requests that reach the engine."""

    def __init__(self, engine) -> None:
        self.engine, self.num_requests = engine, 0

    def sync(self, version: int) -> dict[str, float]:
        return self.engine.sync(version)

    def generate(self, requests, sampling, observer=UNOBSERVED):
        self.num_requests += len(requests)
        return self.engine.generate(requests, sampling, observer)


def test_a_crash_in_the_update_does_not_pay_for_the_rollouts_again(
    tokenizer, make_test_trainer, model_folder: Path, tmp_path: Path
) -> None:
    """Two steps behind the checkpoint and a third whose update dies: one process after another."""
    questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])

    def make_one(version: int) -> tuple[Trainer, Counting]:
        trainer = make_test_trainer(questions, **SETTINGS)
        counting = Counting(trainer.engine)
        journal = JournalledEngine(counting, tmp_path / "rollouts", version=version)
        trainer.engine = trainer.collector.fresh.engine = journal
        trainer.writer.on_committed = journal.forget_before
        return trainer, counting

    first, _ = make_one(0)
    first.step()
    path = first.save()
    losses = [first.step()[1]["loss_hex"] for _ in range(2)]

    def die(*arguments: Any) -> Any:
        raise SystemError("the device is gone")

    learner: Any = first.learner
    learner.update = die
    with pytest.raises(SystemError):
        first.step()

    second, counting = make_one(1)
    restore_run(second, path)
    assert [second.step()[1]["loss_hex"] for _ in range(2)] == losses
    second.step()
    assert counting.num_requests == 0
    second.step()
    assert counting.num_requests > 0
    second.save()
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == []


@pytest.mark.parametrize("select", ["entropy", "random"])
def test_a_signal_gives_up_what_is_being_generated_and_nothing_else(
    tokenizer, make_test_trainer, model_folder: Path, tmp_path: Path, select: str
) -> None:
    """A resumed run asks the same questions again, and the log of rollouts answers what it can."""
    questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])
    settings = SETTINGS | {"replay": SETTINGS["replay"] | {"select": select}}
    settings["rollout"] = {"max_batch_sequences": 5}

    def make_one(version: int) -> tuple[Trainer, Counting]:
        trainer = make_test_trainer(questions, **settings)
        counting = Counting(trainer.engine)
        journal = JournalledEngine(counting, tmp_path / "rollouts", version=version)
        trainer.engine = trainer.collector.fresh.engine = journal
        return trainer, counting

    seed_everything(0)
    whole = make_test_trainer(questions, **settings)
    losses = [whole.step()[1]["loss_hex"] for _ in range(6)]
    end = digest(whole)

    seed_everything(0)
    stopped, counting = make_one(0)
    found: list[str] = []
    asked: list[int] = []
    step, generate = stopped.step, counting.generate

    def record() -> Any:
        batch, metrics = step()
        found.append(metrics["loss_hex"])
        return batch, metrics

    def generate_and_stop(requests, sampling, observer=UNOBSERVED):
        if stopped.num_steps == 3:
            asked.append(len(requests))
            lengths = [len(request.prompt_ids) for request in requests]
            first = sorted(range(len(requests)), key=lambda i: -lengths[i])[:5]  # the first batch
            done = generate([requests[i] for i in first], sampling)
            observer.finished(first, done)
            os.kill(os.getpid(), signal.SIGTERM)
            observer.on_poll()
            pytest.fail("the step was not given up")
        return generate(requests, sampling, observer)

    stopped.step, counting.generate = record, generate_and_stop
    stopped.train()
    assert stopped.stop_signal == signal.SIGTERM
    assert found == losses[:3] and stopped.checkpoints.steps() == [3]
    assert load_state(stopped.checkpoints.folder / "step_3")["begun"]["drawn"]

    seed_everything(99)
    resumed, counting = make_one(3)
    restore_run(resumed, stopped.checkpoints.folder / "step_3")
    assert resumed.step()[1]["loss_hex"] == losses[3]
    assert counting.num_requests == asked[0] - 5
    assert [resumed.step()[1]["loss_hex"] for _ in range(2)] == losses[4:]
    assert digest(resumed) == end


def test_every_process_wide_random_state_comes_back(tmp_path: Path) -> None:
    seed_everything(3)
    for draw_one in (lambda: random.gauss(0, 1), np.random.standard_normal, lambda: torch.randn(5)):
        draw_one()  # leaves a second half behind
    saved = random_state()

    def draw() -> list[float]:
        python = [random.gauss(0, 1), random.random()]
        numpy = [float(np.random.standard_normal()), float(np.random.random())]
        return [*python, *numpy, *torch.randn(4).tolist()]

    expected = draw()
    seed_everything(4)
    assert draw() != expected
    restore_random_state(saved)
    assert draw() == expected


def test_seeds_decide_every_process_wide_state() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(1))]

    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    assert draw() == first
    seed_everything(2**40 + 2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
