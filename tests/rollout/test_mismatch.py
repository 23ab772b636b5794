"""The engine's log-probs against the trainer's: figures, factors, and what reaches the loss."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ScriptedEngine, make_questions

from exgrpo_fast.core.types import Completion, WeightSpan
from exgrpo_fast.rollout.mismatch import NO_CORRECTION, MismatchRule, measure, staleness

D = torch.tensor([0.0, math.log(3.0), -math.log(4.0), math.log(1.5)])  # ratios 1, 3, 1/4, 1.5


@pytest.mark.parametrize(
    ("rule", "factors", "corrected"),
    [
        (MismatchRule("token_truncate", 2.0), [1, 2, 0.25, 1.5], [0, 1, 0, 0]),
        (MismatchRule("token_mask", 2.0), [1, 0, 0.25, 1.5], [0, 1, 0, 0]),
        (MismatchRule("token_mask", 5.0, 0.5), [1, 3, 0, 1.5], [0, 0, 1, 0]),
        # the sequence's ratio is 3 / 4 * 1.5 = 1.125
        (MismatchRule("sequence_truncate", 1.1), [1.1] * 4, [1] * 4),
        (MismatchRule("sequence_truncate", 2.0), [1.125] * 4, [0] * 4),
        (MismatchRule("sequence_mask", 1.1), [0] * 4, [1] * 4),
        (MismatchRule("sequence_mask", 2.0, 1.0), [1.125] * 4, [0] * 4),
    ],
)
def test_factors(rule, factors, corrected) -> None:
    torch.testing.assert_close(rule.factors(D), torch.tensor(factors, dtype=torch.float32))
    assert rule.corrected(D).tolist() == [bool(c) for c in corrected]


def test_without_a_correction_there_are_no_factors() -> None:
    assert NO_CORRECTION.factors(D) is None
    assert not NO_CORRECTION.corrected(D).any()


def test_a_hopeless_ratio_stays_finite() -> None:
    factors = MismatchRule("token_truncate", 1e9).factors(torch.tensor([1000.0, -1000.0]))
    assert factors is not None and factors.isfinite().all()
    assert factors[0] == pytest.approx(math.exp(20.0))


def completion(length: int, *spans: WeightSpan) -> Completion:
    return Completion(torch.zeros(length, dtype=torch.int64), torch.zeros(length), False, spans)


def test_figures_of_a_step() -> None:
    first, second = completion(4, WeightSpan(6, 0, 3), WeightSpan(7, 3, 4)), completion(2)
    found = measure([D, torch.zeros(2)], [first, second], MismatchRule("token_truncate"), version=7)
    absolute = [0, math.log(3), math.log(4), math.log(1.5), 0, 0]
    assert found.mismatch_mean == pytest.approx(sum(absolute) / 6)
    assert found.mismatch_max == pytest.approx(math.log(4))
    # linear interpolation between the two largest of six: 0.99 x 5 = 4.95
    assert found.mismatch_p99 == pytest.approx(0.05 * math.log(3) + 0.95 * math.log(4))
    ratios = [(1, 0), (3, math.log(3)), (0.25, -math.log(4)), (1.5, math.log(1.5))]
    assert found.mismatch_kl == pytest.approx(sum(r - 1 - d for r, d in ratios) / 6)
    assert found.mismatch_corrected_frac == pytest.approx(1 / 6)
    assert (found.staleness_mean, found.staleness_max) == (pytest.approx(3 / 6), 1)


def test_staleness_of_tokens() -> None:
    assert staleness(completion(3, WeightSpan(2, 0, 2), WeightSpan(4, 2, 3)), 5).tolist() == [
        3,
        3,
        1,
    ]
    assert staleness(completion(2), 5).tolist() == [0, 0]


def test_nothing_measured_is_no_mismatch() -> None:
    assert measure([], [], NO_CORRECTION, version=0).mismatch_max == 0.0


# --- through the trainer --------------------------------------------------------------------------


class OffEngine(ScriptedEngine):
    """Says of every token that it was drawn with log-prob -1."""


def loss_of_a_step(make_test_trainer, tokenizer, rule: MismatchRule) -> tuple[float, list]:
    questions = make_questions(tokenizer, ["a", "b"])
    engine = OffEngine(tokenizer, questions)
    for question in questions:
        engine.expect(question.id, "right", "wrong 1", "right 2", "wrong")
    trainer = make_test_trainer(
        questions, engine=engine, rollout={"prompts_per_step": 2, "group_size": 4}
    )
    trainer.collector.fresh.mismatch = rule
    batch, metrics = trainer.step()
    return metrics["loss"], list(batch.groups)


@pytest.mark.parametrize(
    "rule", [MismatchRule("token_truncate", 2e-2), MismatchRule("sequence_mask", 1e-3)]
)
def test_the_factors_reach_the_loss(make_test_trainer, tokenizer, rule) -> None:
    loss, groups = loss_of_a_step(make_test_trainer, tokenizer, rule)
    expected, trajectories = 0.0, [t for group in groups for t in group.trajectories]
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        for trajectory, advantage in zip(group.trajectories, rewards - rewards.mean(), strict=True):
            d = trajectory.behaviour_logprobs.double() + 1.0  # the engine's are all -1
            factors = rule.factors(d)
            assert factors is not None
            # before the update the ratio of the loss is 1
            expected -= float((factors * advantage).sum()) / (len(trajectories) * 12)
    assert expected != 0.0
    assert loss == pytest.approx(expected, rel=1e-5)


def test_without_a_correction_the_engine_does_not_matter(make_test_trainer, tokenizer) -> None:
    loss, groups = loss_of_a_step(make_test_trainer, tokenizer, NO_CORRECTION)
    assert all(t.token_weights is None for group in groups for t in group.trajectories)
