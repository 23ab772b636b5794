"""Which questions and trajectories are chosen: oracles O1 and O9, brute force, plain loops."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from store_cases import Item, experiences, make_store, move

from exgrpo_fast.experience.replay.selectors import (
    allocate,
    bucket_probabilities,
    choose,
    gaussian_buckets,
    max_variance_subset,
    medium_questions,
    stored_keys,
    uniform_questions,
)
from exgrpo_fast.experience.replay.source import reward_std_buckets
from exgrpo_fast.experience.replay.store import ExperienceStore, rank_within

INF, NAN = float("inf"), float("nan")
FULL = dict.fromkeys(range(1, 8), 5)

# --- O1: probabilities of the buckets -------------------------------------------------------------


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
def test_o1_probabilities_of_seven_buckets(
    mean: float, sigma: float, expected: list[float]
) -> None:
    found = bucket_probabilities(FULL, group_size=8, mean=mean, sigma=sigma)
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    assert list(found.values()) == pytest.approx(expected, rel=0, abs=5.1e-7)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("group_size", "sizes", "sigma", "expected"),
    [
        (8, {1: 9, 2: 0, 4: 1, 7: 4}, 0.125, {1: 0.010868, 4: 0.978265, 7: 0.010868}),
        (8, {1: 9, 4: 1, 7: 4}, 1.0, {1: 0.325431, 4: 0.349137, 7: 0.325431}),
        (4, {1: 1, 2: 1, 3: 1}, 0.125, {1: 0.106507, 2: 0.786986, 3: 0.106507}),
    ],
)
def test_o1_empty_buckets_are_left_out(group_size, sizes, sigma, expected) -> None:
    found = bucket_probabilities(sizes, group_size=group_size, mean=0.5, sigma=sigma)
    assert found == pytest.approx(expected, rel=0, abs=5.1e-7)


def test_without_a_filled_bucket_there_is_no_probability() -> None:
    assert bucket_probabilities({1: 0, 2: 0}, group_size=8, mean=0.5, sigma=0.125) == {}


def test_buckets_far_from_the_mean_do_not_underflow_all_together() -> None:
    found = bucket_probabilities({6: 1, 8: 1}, group_size=8, mean=0.0, sigma=0.01)
    assert found == pytest.approx({6: 1.0, 8: 0.0})


# --- O1: capacity ---------------------------------------------------------------------------------


class Undecided(Exception):
    """Whoever draws next has so many outcomes."""


class Scripted:
    """A generator that draws what it is told to, and knows how likely that was."""

    def __init__(self, counts: tuple[int, ...], choices: list[int]) -> None:
        self.counts, self.choices, self.probability = counts, list(choices), 1.0

    def multinomial(self, count: int, probabilities: list[float]) -> tuple[int, ...]:
        assert sum(self.counts) == count
        self.probability *= math.factorial(count)
        for drawn, p in zip(self.counts, probabilities, strict=True):
            self.probability *= p**drawn / math.factorial(drawn)
        return self.counts

    def choice(self, count: int, *, p: np.ndarray) -> int:
        if not self.choices:
            raise Undecided(count)
        drawn = self.choices.pop(0)
        self.probability *= p[drawn]
        return drawn


def outcomes(
    count: int, probabilities: dict[int, float], sizes: dict[int, int], counts, choices=()
) -> list[tuple[float, list[int]]]:
    """(probability, questions per bucket) of everything that `allocate` can do from here on."""
    rng = Scripted(counts, list(choices))
    try:
        found = allocate(count, probabilities, sizes, rng)  # pyright: ignore[reportArgumentType]
    except Undecided as undecided:
        further = [(*choices, i) for i in range(undecided.args[0])]
        return [x for more in further for x in outcomes(count, probabilities, sizes, counts, more)]
    return [(rng.probability, list(found.values()))]


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0.125, [2.531250, 2.000000, 3.468750]), (1.0, [2.564187, 1.860803, 3.575010])],
)
def test_o1_expectation_where_buckets_run_out(sigma: float, expected: list[float]) -> None:
    """Every outcome of `allocate`, weighted by its probability."""
    sizes = {1: 3, 4: 2, 7: 10}
    probabilities = bucket_probabilities(sizes, group_size=8, mean=0.5, sigma=sigma)
    first_draws = [c for c in itertools.product(range(9), repeat=3) if sum(c) == 8]
    found = [x for draw in first_draws for x in outcomes(8, probabilities, sizes, draw)]
    assert sum(p for p, _ in found) == pytest.approx(1.0)
    for _, counts in found:
        assert sum(counts) == 8 and all(np.array(counts) <= [3, 2, 10])
    means = np.sum([p * np.array(counts) for p, counts in found], axis=0)
    assert list(means) == pytest.approx(expected, rel=0, abs=5.1e-7)


def test_a_real_generator_allocates_as_expected() -> None:
    sizes = {1: 3, 4: 2, 7: 10}
    probabilities = bucket_probabilities(sizes, group_size=8, mean=0.5, sigma=1.0)
    rng = np.random.default_rng(0)
    draws = np.array([list(allocate(8, probabilities, sizes, rng).values()) for _ in range(8000)])
    assert (draws.sum(axis=1) == 8).all() and (draws <= [3, 2, 10]).all()
    # Four standard errors; a count of 0 to 3 has a deviation of at most 1.5.
    error = 4 * draws.std(axis=0) / math.sqrt(8000)
    assert (np.abs(draws.mean(axis=0) - [2.564187, 1.860803, 3.575010]) < error).all()


def test_buckets_without_probability_share_what_is_left() -> None:
    rng = np.random.default_rng(0)
    assert allocate(5, {1: 1.0, 2: 0.0, 3: 0.0}, {1: 1, 2: 2, 3: 2}, rng) == {1: 1, 2: 2, 3: 2}


def test_asking_for_more_than_is_stored_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 questions wanted, 3 stored"):
        allocate(9, {2: 1.0}, {2: 3}, np.random.default_rng(0))


# --- draws from a store ---------------------------------------------------------------------------

SIZES = {1: 6, 2: 3, 3: 10, 4: 8, 5: 1, 6: 0, 7: 4}


def bucket_store() -> tuple[ExperienceStore, list[int]]:
    """40 questions, of which those in a bucket of `SIZES` are scattered over the data."""
    buckets = [k for k, size in SIZES.items() for _ in range(size)] + [-1] * 8
    random.Random(0).shuffle(buckets)
    store = make_store(questions=40, group_size=8)
    move(store, {question: k for question, k in enumerate(buckets) if k >= 0})
    return store, buckets


def chi_square(found: Counter, expected: dict[int, float]) -> float:
    assert found.keys() <= expected.keys()
    return sum((found[key] - value) ** 2 / value for key, value in expected.items())


def test_drawn_questions_follow_the_buckets_and_are_uniform_inside_one() -> None:
    store, buckets = bucket_store()
    draw, rng = gaussian_buckets(mean=0.5, sigma=0.25), np.random.default_rng(1)
    drawn = Counter(draw(store, 1, rng, 0)[0] for _ in range(6000))
    p = bucket_probabilities(SIZES, group_size=8, mean=0.5, sigma=0.25)
    assert set(p) == {1, 2, 3, 4, 5, 7}
    by_bucket = Counter({k: 0 for k in p})
    for question, count in drawn.items():
        by_bucket[buckets[question]] += count
    assert chi_square(by_bucket, {k: 6000 * p[k] for k in p}) < 20.5  # 5 degrees, 0.1 %
    of_each = {q: 6000 * p[k] / SIZES[k] for q, k in enumerate(buckets) if k >= 0}
    assert chi_square(drawn, of_each) < 61.1  # 31 degrees, 0.1 %


def test_drawn_questions_are_distinct_stored_and_as_many_as_wanted() -> None:
    store, buckets = bucket_store()
    draw, rng = gaussian_buckets(mean=0.5, sigma=0.125), np.random.default_rng(2)
    fours = 0
    for _ in range(200):
        drawn = draw(store, 12, rng, 0)
        assert len(set(drawn)) == len(drawn) == 12
        found = Counter(buckets[question] for question in drawn)
        assert all(found[k] <= SIZES.get(k, 0) for k in found) and found[-1] == 0
        fours += found[4]
    # 4.8 of 12 would fall on bucket 4 if it had no end; 8 questions are nearly never too few.
    assert fours / 200 > 0.9 * 12 * 0.399
    everything = [question for question, k in enumerate(buckets) if k >= 0]
    assert sorted(draw(store, 99, rng, 0)) == everything
    store.retire(torch.tensor(everything[:5]))
    assert sorted(draw(store, 99, rng, 0)) == everything[5:]
    assert draw(make_store(), 5, rng, 0) == uniform_questions(make_store(), 5, rng, 0) == []


@pytest.mark.parametrize(("stored", "drawn"), [(0, 0), (10, 10), (63, 63), (64, 64), (5000, 64)])
def test_o1_half_of_128_questions_are_drawn_where_so_many_are_stored(
    stored: int, drawn: int
) -> None:
    store = make_store(questions=5000, group_size=8)
    store.bucket[:stored] = 1 + torch.arange(stored, dtype=torch.int16) % 7
    for selector in (gaussian_buckets(mean=0.5, sigma=0.125), uniform_questions):
        questions = selector(store, int(0.5 * 128), np.random.default_rng(0), 1)
        assert len(set(questions)) == len(questions) == drawn


@pytest.mark.parametrize("selector", [gaussian_buckets(mean=0.5, sigma=0.125), uniform_questions])
def test_draws_depend_on_the_seed_and_on_what_is_stored_alone(selector: Callable) -> None:
    questions = list(range(20))
    items = [Item(q, (q, i)) for q in questions for i in range(1 + q % 2)]
    buckets = {q: 1 + q % 7 for q in questions}

    def draws(order: list[Item], batch: int, seed: int) -> list[list[int]]:
        store = make_store(questions=20, group_size=8)
        for start in range(0, len(order), batch):
            store.add(experiences(order[start : start + batch]))
            move(store, {i.question: buckets[i.question] for i in order[start : start + batch]})
        rng = np.random.default_rng(seed)
        return [selector(store, 6, rng, step) for step in range(20)]

    shuffled = random.Random(0).sample(items, len(items))
    expected = draws(items, 30, seed=0)
    assert draws(items, 30, seed=0) == draws(shuffled, 4, seed=0) == expected
    assert draws(items, 30, seed=1) != expected


def test_uniform_questions_are_uniform_over_the_stored() -> None:
    store, buckets = bucket_store()
    draw, rng = uniform_questions, np.random.default_rng(3)
    drawn = [draw(store, 4, rng, 0) for _ in range(2000)]
    assert all(len(set(questions)) == 4 for questions in drawn)
    stored = [question for question, k in enumerate(buckets) if k >= 0]
    found = Counter(question for questions in drawn for question in questions)
    # Without replacement the counts spread less than the bound for 31 degrees allows.
    assert chi_square(found, dict.fromkeys(stored, 2000 * 4 / len(stored))) < 61.1
    assert sorted(draw(store, 99, rng, 0)) == stored


# --- questions of medium difficulty ---------------------------------------------------------------


def visited_store() -> ExperienceStore:
    """Question q had q of 8 right; all but 9 are stored."""
    store = make_store(questions=10, group_size=8)
    store.visit(torch.arange(9), torch.arange(9), step=1)
    move(store, {question: question for question in range(9)})
    return store


def ask(store: ExperienceStore, count: int, step: int, **changes) -> list[int]:
    settings = {"low": 0.25, "high": 0.75, "cooldown": 3, "max_visits": 2} | changes
    return medium_questions(**settings)(store, count, np.random.default_rng(0), step)


def test_the_nearest_to_one_half_come_first() -> None:
    store = visited_store()
    assert ask(store, 99, step=5) == [4, 3, 5, 2, 6]
    assert ask(store, 3, step=5) == [4, 3, 5]
    assert ask(store, 99, step=5, low=0.0, high=0.375) == [3, 2, 1, 0]
    assert ask(store, 99, step=5, low=0.9, high=0.95) == []


def test_of_equally_near_ones_the_longest_unseen_comes_first() -> None:
    store = visited_store()
    store.visit(torch.tensor([3]), torch.tensor([3]), step=4)
    assert ask(store, 99, step=9, max_visits=9) == [4, 5, 3, 2, 6]


def test_a_question_waits_after_each_visit_and_comes_so_often_only() -> None:
    store = visited_store()
    assert ask(store, 99, step=4) == []  # visited in step 1, three steps of rest
    store.visit(torch.tensor([4]), torch.tensor([5]), step=5)
    assert ask(store, 99, step=9) == [3, 5, 2, 6], "question 4 came twice"
    assert ask(store, 99, step=8, max_visits=3) == [3, 5, 2, 6], "and rests"
    assert ask(store, 99, step=9, max_visits=3) == [3, 5, 4, 2, 6], "its rate is the latest one"


def test_what_is_not_stored_is_not_asked() -> None:
    store = visited_store()
    store.retire(torch.tensor([4]))
    store.bucket[3] = -1
    assert ask(store, 99, step=5) == [5, 2, 6]


# --- trajectories ---------------------------------------------------------------------------------


def slow_rank(owner: list[int], keys: list[float]) -> list[int]:
    """NaN is the largest; of equals the earlier one is smaller."""
    rank = [0] * len(owner)
    for o in set(owner):
        mine = [i for i in range(len(owner)) if owner[i] == o]
        mine.sort(key=lambda i: (math.isnan(keys[i]), 0 if math.isnan(keys[i]) else keys[i]))
        for place, i in enumerate(mine):
            rank[i] = place
    return rank


def slow_choose(owner: list[int], keys: list[float], count: int) -> list[int]:
    keys = [INF if math.isnan(key) else key for key in keys]
    rank = slow_rank(owner, keys)
    return sorted(
        (i for i in range(len(owner)) if rank[i] < count), key=lambda i: (owner[i], rank[i])
    )


@pytest.mark.parametrize("seed", range(40))
def test_ranks_and_choices_are_those_of_a_plain_loop(seed: int) -> None:
    rng = random.Random(seed)
    length = rng.choice([0, 1, 2, 7, 40])
    owner = [rng.randrange(5) for _ in range(length)]
    if seed % 2:
        owner.sort()
    keys = [rng.choice([0.0, -1.5, 1.0, 1.0, 2.5, NAN, INF, -INF]) for _ in range(length)]
    owners, values = torch.tensor(owner, dtype=torch.int64), torch.tensor(keys)
    assert rank_within(owners, values).tolist() == slow_rank(owner, keys)
    for count in (1, 2, 9):
        assert choose(owners, values, count).tolist() == slow_choose(owner, keys, count)


def test_whole_numbers_are_ranked_too() -> None:
    owner = torch.tensor([1, 0, 1, 1, 0])
    assert rank_within(owner, torch.tensor([2**60 + 1, 5, 2**60, -3, 5])).tolist() == [
        2,
        0,
        1,
        0,
        1,
    ]


def stored_choice(by, count: int = 1, seed: int = 0) -> list[int]:
    """Places chosen among three trajectories of one question and two of another."""
    items = [
        Item(0, (i,), entropy=e, reward=r)
        for i, (e, r) in enumerate([(2, 0.5), (1, 0.25), (INF, 1)])
    ]
    items += [Item(1, (i,), entropy=e, reward=r) for i, (e, r) in enumerate([(INF, 0), (3, 0)])]
    keys = stored_keys(by, experiences(items), np.random.default_rng(seed))
    return choose(torch.tensor([0, 0, 0, 1, 1]), keys, count).tolist()


def test_keys_that_follow_from_what_is_stored() -> None:
    assert stored_choice("stored_entropy") == [1, 4]
    assert stored_choice("stored_entropy", 2) == [1, 0, 4, 3]
    assert stored_choice("newest") == [2, 4]
    assert stored_choice("newest", 2) == [2, 1, 4, 3]
    assert stored_choice("highest_reward") == [2, 3]  # of equals the earlier one
    assert stored_choice("all", 9) == [0, 1, 2, 3, 4]


def test_a_random_choice_takes_each_alike() -> None:
    drawn = [stored_choice("random", seed=seed) for seed in range(900)]
    assert stored_choice("random", seed=5) == drawn[5]
    first, second = Counter(a for a, _ in drawn), Counter(b for _, b in drawn)
    assert chi_square(first, dict.fromkeys([0, 1, 2], 300.0)) < 13.8  # 2 degrees, 0.1 %
    assert chi_square(second, dict.fromkeys([3, 4], 450.0)) < 10.8


# --- the subset of the largest variance -----------------------------------------------------------


def largest_variance(rewards: tuple[float, ...], count: int) -> float:
    return max(float(np.var(subset)) for subset in itertools.combinations(rewards, count))


def assert_best(rewards: tuple[float, ...], count: int) -> None:
    chosen = max_variance_subset(rewards, count)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(rewards))
    found = float(np.var([rewards[i] for i in chosen]))
    assert found == pytest.approx(largest_variance(rewards, len(chosen)), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_subset_has_a_larger_variance(size: int) -> None:
    for rewards in itertools.product([0.0, 0.25, 1.0, -1.0], repeat=size):
        for count in range(1, size + 2):
            assert_best(rewards, count)


def test_no_subset_of_many_random_rewards_has_a_larger_variance() -> None:
    rng = random.Random(0)
    for size in range(5, 10):
        for count in range(1, size):
            assert_best(tuple(rng.gauss(0, 1) for _ in range(size)), count)


def test_the_subset_of_the_largest_variance_by_hand() -> None:
    assert max_variance_subset([0.0, 1.0, 0.5, 0.9, 0.1], 2) == [0, 1]
    assert max_variance_subset([0.0, 1.0, 0.5, 0.9, 0.1], 4) == [0, 1, 3, 4]
    assert max_variance_subset([0.3, 0.1], 5) == [0, 1]


# --- O9: difficulty of continuous rewards ---------------------------------------------------------


def test_o9_buckets_of_continuous_rewards() -> None:
    stds = [0.05, 0.12, 0.31, 0.20, 0.48, 0.02]
    rewards = [[3.0 - std, 3.0 + std] for std in stds]  # two values have half their distance as std
    assert reward_std_buckets(rewards, 8) == [1, 2, 5, 3, 8, 0]
    assert reward_std_buckets(rewards[::-1], 8) == [0, 8, 3, 5, 2, 1]
    assert reward_std_buckets([[1.0, 1.0], [0.5, 0.5]], 8) == [0, 0], "all alike"
    near = [[0.0, 2 * std] for std in (0.40, 0.45, 0.50)]
    assert reward_std_buckets(near, 8) == [0, 4, 8], "the least of the batch is bucket 0"
