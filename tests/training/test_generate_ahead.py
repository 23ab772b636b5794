"""Generation for the next step beside the training of this one, through the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import make_questions
from toy_runs import replayed_in

from exgrpo_fast.core.types import Completion, WeightSpan
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.training.trainer import Trainer


class Ready:
    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        observer.finished(range(len(self.completions)), self.completions)
        observer.on_poll()
        return self.completions


class EagerEngine(TransformersEngine):
    """Generates when it is started, as one elsewhere would, and stamps the weights it used."""

    events: list[str]
    version = 0

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Any:
        self.events.append(f"start {len(requests)}")
        return Ready(
            [
                replace(c, weight_spans=(WeightSpan(self.version, 0, len(c.token_ids)),))
                for c in self.generate(requests, sampling)
            ]
        )

    def sync(self, version: int) -> dict[str, float]:
        self.events.append(f"sync {version}")
        self.version = version
        return {}


@pytest.fixture
def make(tokenizer, make_test_trainer):
    def make_one(*, max_steps: int = 4, **sections: Any) -> Trainer:
        questions = make_questions(tokenizer, [f"q{i}" for i in range(12)])
        train = {"max_steps": max_steps, "lr": 0.02, "max_tokens_per_microbatch": 256}
        trainer = make_test_trainer(questions, function="even_length", train=train, **sections)
        trainer.engine.__class__ = EagerEngine
        trainer.engine.events = []
        trainer.generate_ahead = True
        return trainer

    return make_one


def test_a_step_is_begun_before_the_update_of_the_one_before(make) -> None:
    trainer = make(max_steps=3)
    rows = [trainer.step()[1] for _ in range(3)]
    assert trainer.engine.events == [
        "start 16",
        "start 16",
        "sync 1",
        "start 16",
        "sync 2",
        "sync 3",  # nothing is begun that nobody will use
    ]
    assert [row["staleness_max"] for row in rows] == [0, 1, 1]
    assert [row["staleness_mean"] for row in rows] == [0.0, 1.0, 1.0]
    assert rows[0]["mismatch_max"] < 1e-5 < 1e-4 < rows[1]["mismatch_max"]
    assert trainer.collector.begun is None


def test_replay_plans_on_what_it_has_seen(make) -> None:
    """What is kept of a step can be replayed in the next, and every group stays full."""
    trainer = make(
        max_steps=6,
        replay={"enabled": True, "experience_ratio": 0.5, "start_success_rate": None},
    )
    replayed = 0
    for step in range(1, 7):
        batch, metrics = trainer.step()
        assert all(len(group.trajectories) == 4 for group in batch.groups)
        assert all(t.birth_step < step for t in replayed_in(batch))
        replayed += len(replayed_in(batch))
        names = [group.question.id for group in batch.groups]
        assert len(set(names)) == len(names)
    assert replayed >= 4


def questions_of(trainer: Trainer) -> list[str]:
    batch, _ = trainer.step()
    return [group.question.id for group in batch.groups]


@pytest.mark.parametrize("replay", [{}, {"enabled": True, "start_success_rate": None}])
def test_a_resumed_run_asks_what_was_begun(make, replay) -> None:
    """The completions are drawn anew, by the weights of the checkpoint."""
    whole, resumed = make(replay=replay), make(replay=replay)
    whole.step(), whole.step()
    state = whole.state_dict()
    begun = whole.collector.state_dict()
    assert len(begun["planned"]) + len(begun["drawn"]) == 4
    resumed.learner.policy.model.load_state_dict(whole.learner.policy.model.state_dict())
    resumed.load_state_dict(state)
    assert resumed.collector.state_dict() == begun
    assert questions_of(resumed) == questions_of(whole)


def test_a_checkpoint_knows_questions_that_the_data_lost(make) -> None:
    trainer, other = make(), make()
    trainer.step()
    state = trainer.state_dict()
    state["begun"]["drawn"][0] = "gone"
    with pytest.raises(ValueError, match="gone"):
        other.load_state_dict(state)


def test_a_step_begun_with_replay_goes_on_without_it(make) -> None:
    trainer, other = make(), make()
    trainer.step()
    state = trainer.state_dict()
    names = state["begun"]["drawn"]
    state["begun"] = {"planned": names[:1], "drawn": names[1:]}
    other.load_state_dict(state)
    assert questions_of(other) == names
