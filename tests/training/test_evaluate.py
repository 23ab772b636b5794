"""avg@n and pass@k against counting, the interval against repetition, the evaluator by script."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import ScriptedEngine, make_questions

from exgrpo_fast.training.evaluate import bootstrap_interval, mean_pass_at_k


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_equals_counting_all_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert mean_pass_at_k([c], n, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_mean_over_questions() -> None:
    assert mean_pass_at_k([0, 1, 2, 4], 4, 2) == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    """300 samples of 60 questions: 95 % +- 3 standard errors of 1.3 %, less what small n costs."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        sample = rng.binomial(8, 0.3, size=60) / 8
        low, high = bootstrap_interval(sample, seed=trial, resamples=400)
        assert low < sample.mean() < high
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_of_equal_questions_is_a_point() -> None:
    assert bootstrap_interval(np.full(10, 0.25), seed=0) == (0.25, 0.25)


def test_the_interval_narrows_with_the_root_of_the_questions() -> None:
    few, many = (np.tile([0.0, 1.0], n) for n in (50, 800))
    widths = [np.diff(bootstrap_interval(x, seed=0))[0] for x in (few, many)]
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.15)


def test_the_evaluator_counts_what_was_said(tokenizer, make_test_trainer) -> None:
    questions = make_questions(tokenizer, list("abc"))
    engine = ScriptedEngine(tokenizer, questions)
    trainer = make_test_trainer(
        questions, engine=engine, held_out=questions, eval={"n": 4, "k": [1, 2, 4], "examples": 2}
    )
    engine.expect("a", "right", "wrong", "wrong", "wrong")
    engine.expect("b", "wrong", "wrong", "wrong", "wrong")
    engine.expect("c", "right", "right", "right", "wrong")
    found = trainer.evaluate()
    assert found.avg_at_n == pytest.approx(4 / 12)
    assert found.pass_at_k == pytest.approx({"1": 4 / 12, "2": (1 / 2 + 1) / 3, "4": 2 / 3})
    assert (found.n, found.questions, found.truncated) == (4, 3, 0.0)
    first, second = found.examples
    assert (first.question, first.completion, first.reward) == (
        questions[0].conversation[-1]["content"],
        "right",
        1.0,
    )
    assert (second.question, second.completion, second.reward) == (
        questions[1].conversation[-1]["content"],
        "wrong",
        0.0,
    )
    assert 0.0 <= found.avg_at_n_low <= found.avg_at_n <= found.avg_at_n_high <= 0.75
    tokens = [len(tokenizer(f"{word}<|end|>")["input_ids"]) for word in ("right", "wrong")]
    assert found.completion_len_mean == pytest.approx((4 * tokens[0] + 8 * tokens[1]) / 12)


def test_evaluating_twice_gives_the_same_and_leaves_training_alone(
    tokenizer, make_test_trainer
) -> None:
    questions = make_questions(tokenizer, [f"q{i}" for i in range(8)])
    plain = make_test_trainer(questions, function="even_length")
    evaluated = make_test_trainer(questions, function="even_length", held_out=questions[:3])
    assert evaluated.evaluate() == evaluated.evaluate()
    assert evaluated.evaluate().truncated > 0  # a random policy does not end in 12 tokens
    samples = evaluated.evaluator.sample(questions[:3])
    assert len({tuple(s.completion.token_ids.tolist()) for s in samples}) == 6  # n = 2, all differ
    assert [plain.step()[1]["loss_hex"] for _ in range(2)] == [
        evaluated.step()[1]["loss_hex"] for _ in range(2)
    ]
