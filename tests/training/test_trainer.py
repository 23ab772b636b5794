"""The order of the rooms: how a run goes on, pauses, evaluates, and stops."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from conftest import make_questions

from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.sinks import MetricSink
from exgrpo_fast.training.step_metrics import peak_memory_gib
from exgrpo_fast.training.trainer import MAX_BAD_UPDATES, NumericalStop


class Log(MetricSink):
    def __init__(self, on_step=lambda step: None) -> None:
        self.rows: list[dict] = []
        self.on_step = on_step

    def log(self, step, metrics) -> None:
        self.rows.append(dict(metrics))
        self.on_step(step)


@pytest.fixture
def make(tokenizer, make_test_trainer):
    """make(max_steps=..., evaluate=False, **sections) -> (trainer, its log)"""

    def make_one(*, max_steps: int = 3, evaluate: bool = False, on_step=lambda step: None, **more):
        questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
        more["train"] = {"lr": 1e-3, "max_tokens_per_microbatch": 256} | more.get("train", {})
        more["train"]["max_steps"] = max_steps
        held_out = questions[:2] if evaluate else ()
        trainer = make_test_trainer(questions, function="even_length", held_out=held_out, **more)
        trainer.sink = Log(on_step)
        return trainer, trainer.sink

    return make_one


def test_a_run_ends_at_max_steps_with_a_checkpoint(make) -> None:
    trainer, log = make(max_steps=3)
    trainer.train()
    assert [row["step"] for row in log.rows] == [1, 2, 3]
    assert trainer.checkpoints.steps() == [3]
    path = trainer.checkpoints.folder / "step_3"
    verify(path)
    assert load_state(path)["num_steps"] == 3
    trainer.train()  # nothing left to do
    assert len(log.rows) == 3


def test_stop_after_counts_the_steps_of_this_call(make) -> None:
    trainer, log = make(max_steps=5)
    for expected in ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        trainer.train(stop_after=2)
        assert [row["step"] for row in log.rows] == expected
        assert trainer.checkpoints.steps()[-1] == expected[-1]


def test_checkpoints_are_written_as_often_as_asked(make) -> None:
    trainer, _ = make(max_steps=5, checkpoint={"every": 2, "keep": 9})
    trainer.train()
    assert trainer.checkpoints.steps() == [2, 4, 5]


def test_eval_every_evaluates_in_between(make) -> None:
    trainer, log = make(max_steps=4, evaluate=True, eval={"n": 2, "k": [1, 2], "every": 2})
    trainer.train()
    evaluated = [row["step"] for row in log.rows if "eval_avg_at_n" in row]
    assert evaluated == [2]  # the caller evaluates after the last step
    assert log.rows[1]["eval_pass_at_k"].keys() == {"1", "2"}
    assert log.rows[1]["eval_avg_at_n"] == log.rows[1]["eval_pass_at_k"]["1"]


def test_three_refused_updates_in_a_row_stop_the_run(make) -> None:
    trainer, log = make(max_steps=9, train={"skip_grad_norm": 1e-9})
    before = [p.detach().clone() for p in trainer.learner.policy.trainable_parameters]
    with pytest.raises(NumericalStop) as caught:
        trainer.train()
    assert str(caught.value).startswith(f"step {MAX_BAD_UPDATES}: update_gradient_too_large for")
    assert trainer.num_steps == MAX_BAD_UPDATES == 3
    after = trainer.learner.policy.trainable_parameters
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_good_update_in_between_forgives(make) -> None:
    optimiser: Any = None

    def alternate(step: int) -> None:
        optimiser.skip_grad_norm = 500.0 if step % 3 == 2 else 1e-9

    trainer, log = make(max_steps=7, train={"skip_grad_norm": 1e-9}, on_step=alternate)
    optimiser = trainer.learner.optimiser
    trainer.train()
    assert [row["skipped"] for row in log.rows] == [1, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(make, number: int) -> None:
    handler = signal.getsignal(number)
    trainer, log = make(
        max_steps=9, on_step=lambda step: os.kill(os.getpid(), number) if step == 2 else None
    )
    trainer.train()
    assert (trainer.stop_signal, trainer.num_steps, len(log.rows)) == (number, 2, 2)
    assert trainer.checkpoints.steps() == [2]
    assert signal.getsignal(number) is handler


def test_a_second_signal_ends_it_at_once(make) -> None:
    def twice(step: int) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer, _ = make(on_step=twice)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.checkpoints.steps() == []
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_on_policy_run_may_go_on_with_replay(make) -> None:
    plain, _ = make(max_steps=2)
    plain.train()
    state = load_state(plain.checkpoints.folder / "step_2")
    trainer, _ = make(max_steps=3, replay={"enabled": True})
    trainer.load_state_dict(state)
    assert trainer.num_steps == 2 and len(trainer.replay.store) == 0
    trainer.train()
    assert trainer.num_steps == 3


def test_peak_memory_counts_what_was_touched():
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(2**26, dtype=torch.float64)  # 0.5 GiB, written
    after = peak_memory_gib(torch.device("cpu"))
    del block
    assert 0.01 < before <= after < 64
    assert after >= 0.5
    assert peak_memory_gib(torch.device("cpu")) >= after  # a peak never falls
