"""Batches that hold next to nothing, through the trainer: finite numbers, and on it goes."""

from __future__ import annotations

import math

import pytest
from conftest import ScriptedEngine, make_questions

STEPS, GROUP = 20, 4


@pytest.mark.parametrize("empty", [1, 8, 16], ids=["one", "half", "all"])
def test_responses_of_the_end_token_alone(tokenizer, make_test_trainer, empty: int) -> None:
    """Of 16 responses a step so many are empty; the rest is right and wrong by turns."""
    questions = make_questions(tokenizer, ["a", "b", "c", "d"])
    engine = ScriptedEngine(tokenizer, questions)
    trainer = make_test_trainer(questions, engine=engine)
    for _ in range(STEPS):
        texts = [""] * empty + ["right" if i % 2 else "wrong" for i in range(16 - empty)]
        for i, question in enumerate(questions):
            engine.expect(question.id, *texts[i * GROUP : (i + 1) * GROUP])
    for _ in range(STEPS):
        batch, metrics = trainer.step()
        found = [t for group in batch.generated for t in group.trajectories]
        assert sum(t.num_tokens == 1 for t in found) == empty
        assert all(t.reward == 0.0 for t in found if t.num_tokens == 1)
        assert math.isfinite(metrics["loss"]) and metrics["completion_len_mean"] >= 1
        assert ("update_without_gradient" in metrics["reasons"]) == (empty == 16)
    weights = trainer.learner.policy.model.parameters()
    assert all(bool(weight.isfinite().all()) for weight in weights)


def test_a_batch_larger_than_the_data_takes_all_of_it(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, ["a", "b", "c"])
    trainer = make_test_trainer(questions, rollout={"prompts_per_step": 8})
    for step in range(1, 4):
        batch, _ = trainer.step()
        assert sorted(group.question.id for group in batch.groups) == ["a", "b", "c"]
        assert trainer.stream.state_dict()["epoch"] == step - 1
