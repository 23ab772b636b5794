"""Oracle O1 of the ExGRPO specification: bucket probabilities, capacity, number of questions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exgrpo_fast.buffer.selectors import allocate, bucket_probabilities, draw_questions
from exgrpo_fast.buffer.store import ExperienceStore

FULL = dict.fromkeys(range(1, 8), 5)


@pytest.mark.parametrize(
    ("mean", "sigma", "expected"),
    [
        (0.5, 0.125, [0.004433, 0.054006, 0.242036, 0.399050, 0.242036, 0.054006, 0.004433]),
        (0.5, 1.0, [0.137334, 0.142805, 0.146192, 0.147338, 0.146192, 0.142805, 0.137334]),
        (0.5, 0.5, [0.121491, 0.142037, 0.155997, 0.160949, 0.155997, 0.142037, 0.121491]),
        (0.5, 0.0625, [0.000000, 0.000264, 0.106451, 0.786571, 0.106451, 0.000264, 0.000000]),
        (0.5, 0.1875, [0.036633, 0.111281, 0.216745, 0.270682, 0.216745, 0.111281, 0.036633]),
        (0.25, 0.125, [0.257021, 0.423757, 0.257021, 0.057349, 0.004708, 0.000142, 0.000002]),
    ],
)
def test_probabilities_of_seven_buckets(mean: float, sigma: float, expected: list[float]) -> None:
    found = bucket_probabilities(FULL, group_size=8, mean=mean, sigma=sigma)
    assert list(found.values()) == pytest.approx(expected, abs=6e-7)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("group_size", "sizes", "sigma", "expected"),
    [
        (8, {1: 9, 2: 0, 4: 1, 7: 4}, 0.125, {1: 0.010868, 4: 0.978265, 7: 0.010868}),
        (8, {1: 9, 4: 1, 7: 4}, 1.0, {1: 0.325431, 4: 0.349137, 7: 0.325431}),
        (4, {1: 1, 2: 1, 3: 1}, 0.125, {1: 0.106507, 2: 0.786986, 3: 0.106507}),
    ],
)
def test_empty_buckets_are_left_out(group_size, sizes, sigma, expected) -> None:
    found = bucket_probabilities(sizes, group_size=group_size, mean=0.5, sigma=sigma)
    assert found == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0.125, [2.531250, 2.000000, 3.468750]), (1.0, [2.564187, 1.860803, 3.575010])],
)
def test_what_does_not_fit_is_handed_out_singly(sigma: float, expected: list[float]) -> None:
    sizes = {1: 3, 4: 2, 7: 10}
    probabilities = bucket_probabilities(sizes, group_size=8, mean=0.5, sigma=sigma)
    rng = np.random.default_rng(0)
    draws = np.array([list(allocate(8, probabilities, sizes, rng).values()) for _ in range(20_000)])
    assert (draws.sum(axis=1) == 8).all()
    assert (draws <= [3, 2, 10]).all()
    assert draws.mean(axis=0) == pytest.approx(expected, abs=0.02)


def test_asking_for_more_than_is_stored_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 questions wanted, 3 stored"):
        allocate(9, {2: 1.0}, {2: 3}, np.random.default_rng(0))


def test_drawn_questions_are_distinct_and_follow_the_buckets() -> None:
    store = ExperienceStore(group_size=8)
    for i in range(70):
        store.add(f"q{i}", torch.tensor([i]), torch.zeros(1), birth_step=1)
        store.move(f"q{i}", 1 + i % 7)
    rng = np.random.default_rng(1)
    hits = np.zeros(8)
    for _ in range(500):
        drawn = draw_questions(store, 12, mean=0.5, sigma=0.125, rng=rng)
        assert len(set(drawn)) == 12
        for question in drawn:
            hits[1 + int(question[1:]) % 7] += 1
    assert hits[4] == 500 * 12 - hits[[1, 2, 3, 5, 6, 7]].sum()
    assert hits[4] / hits.sum() == pytest.approx(0.399, abs=0.02)
    assert hits[3] / hits.sum() == pytest.approx(0.242, abs=0.02)
