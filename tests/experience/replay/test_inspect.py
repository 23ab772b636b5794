"""What the commands of `exgrpo-fast buffer` say of a small store, and what they leave of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from store_cases import Item, add, make_store, move

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.experience.replay.inspect import (
    StoredQuestion,
    StoredTrajectory,
    age_spans,
    find_question,
    prune,
    stats,
    stored_questions,
    stored_trajectories,
)
from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot
from exgrpo_fast.experience.replay.store import ExperienceStore
from exgrpo_fast.model.packing import Ragged

NAMES = ["apple", "beech", "cedar", "dogwood", "elder", "fir"]
STORED = [
    Item(1, (5, 6, 7), (-0.5, -0.25, -0.75), entropy=0.75, birth_step=2),
    Item(0, (5, 6), (-1.0, -1.0), entropy=0.25, birth_step=3),
    Item(1, (8,), (-0.25,), birth_step=4, truncated=True),  # never scored
    Item(1, (9, 9, 9, 9, 9), (-2.0,) * 5, entropy=0.5, birth_step=9, reward=0.5),
    Item(3, (4,), (-0.125,), birth_step=9),
]


@pytest.fixture
def small() -> dict[str, Any]:
    """After step 10: apple and beech lie in buckets, cedar has failed, dogwood has a trajectory of
    a pool and was never asked, elder is retired, and nothing is known of fir."""
    store = make_store()
    add(store, *STORED)
    for step, places, successes in [(3, [0, 1], [1, 2]), (9, [1, 2, 4], [3, 0, 4])]:
        store.visit(torch.tensor(places), torch.tensor(successes), step=step)
    move(store, {0: 1, 1: 3})
    store.retire(torch.tensor([4]))
    store.num_evicted = 7
    return snapshot(store, NAMES, vocabulary="v")


def loaded(state: dict[str, Any]) -> ExperienceStore:
    store = make_store()
    load_snapshot(store, state, {name: i for i, name in enumerate(NAMES)}, vocabulary="v")
    return store


def tokens_of(state: dict[str, Any]) -> list[list[int]]:
    return [t.tolist() for t in Ragged(state["token_ids"], state["lengths"]).split()]


def ids(found: list[StoredQuestion]) -> list[str]:
    return [question.id for question in found]


# --- the store as a whole -------------------------------------------------------------------------


def test_stats_of_a_small_store(small) -> None:
    assert stats(small, step=10) == {
        "step": 10,
        "group_size": 4,
        "questions": 2,
        "retired": 1,
        "trajectories": 5,
        "tokens": 12,
        "bytes": 12 * (4 + 4),
        "evicted": 7,
        "buckets": {1: 1, 3: 1},
        "ages": {"1": 2, "4-7": 2, "8-15": 1},
        "trajectories_per_question": {"mean": pytest.approx(5 / 3), "min": 1, "max": 3},
        "age": {"mean": 4.6, "min": 1, "max": 8},
        "length": {"mean": 2.4, "min": 1, "max": 5},
        "entropy": {"mean": 0.5, "min": 0.25, "max": 0.75},  # those never scored are left out
        "never_scored": 2,
    }


def test_stats_of_an_empty_store() -> None:
    found = stats(snapshot(make_store(), NAMES), step=0)
    numbers = ("questions", "retired", "trajectories", "tokens", "bytes", "never_scored")
    assert [found[name] for name in numbers] == [0] * 6
    assert (found["buckets"], found["ages"]) == ({}, {})
    for name in ("trajectories_per_question", "age", "length", "entropy"):
        assert found[name] is None


def test_spans_of_ages_begin_at_powers_of_two() -> None:
    ages = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 1023, 1024])
    assert age_spans(ages) == {
        "0": 2,
        "1": 1,
        "2-3": 2,
        "4-7": 2,
        "8-15": 1,
        "512-1023": 1,
        "1024-2047": 1,
    }


# --- questions and their trajectories -------------------------------------------------------------


def test_a_question_is_described_by_its_trajectories(small) -> None:
    apple, beech = stored_questions(small, bucket=1) + stored_questions(small, bucket=3)
    assert apple == StoredQuestion("apple", 1, False, 1, 3, 1, lowest_entropy=0.25, newest=3)
    assert beech == StoredQuestion("beech", 3, False, 2, 9, 3, lowest_entropy=0.5, newest=9)


def test_questions_of_which_nothing_is_stored_are_known_but_not_listed(small) -> None:
    assert ids(stored_questions(small)) == ["dogwood", "apple", "beech"]
    cedar, elder = find_question(small, "cedar"), find_question(small, "elder")
    assert cedar == StoredQuestion("cedar", -1, False, 1, 9, 0, lowest_entropy=None, newest=None)
    assert elder == StoredQuestion("elder", -1, True, 1, 9, 0, lowest_entropy=None, newest=None)


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("bucket", ["dogwood", "apple", "beech"]),  # one without a bucket comes first
        ("trajectories", ["beech", "apple", "dogwood"]),
        ("visits", ["beech", "apple", "dogwood"]),
        ("entropy", ["apple", "beech", "dogwood"]),  # never scored comes last
        ("age", ["apple", "beech", "dogwood"]),  # equals in the order of the data
    ],
)
def test_the_order_of_a_listing(small, sort, order: list[str]) -> None:
    assert ids(stored_questions(small, sort=sort)) == order
    assert ids(stored_questions(small, sort=sort, limit=2)) == order[:2]


def test_the_trajectories_of_a_question(small) -> None:
    assert stored_trajectories(small, "beech") == [
        StoredTrajectory([5, 6, 7], 1.0, 2, 0.75, -0.5, False),
        StoredTrajectory([8], 1.0, 4, None, -0.25, True),
        StoredTrajectory([9, 9, 9, 9, 9], 0.5, 9, 0.5, -2.0, False),
    ]
    assert stored_trajectories(small, "cedar") == []


@pytest.mark.parametrize(
    ("name", "said"), [("cedr", "'cedr'; did you mean 'cedar'?"), ("fir", "question 'fir'")]
)
def test_an_unknown_question_is_one_line(small, name: str, said: str) -> None:
    with pytest.raises(UserError, match="nothing is known of a question") as raised:
        find_question(small, name)
    assert str(raised.value).endswith(said)


# --- a smaller store ------------------------------------------------------------------------------


def test_the_age_limit_itself_stays(small) -> None:
    smaller, dropped = prune(small, step=10, max_age=7)
    assert (dropped, tokens_of(smaller)) == (1, [[5, 6], [8], [9] * 5, [4]])
    assert smaller["behaviour_logprobs"].tolist() == [-1.0] * 2 + [-0.25] + [-2.0] * 5 + [-0.125]
    assert smaller["trajectories"]["birth_step"].tolist() == [3, 4, 9, 9]


def test_a_question_left_without_a_trajectory_leaves_its_bucket(small) -> None:
    smaller, dropped = prune(small, step=10, max_age=1)
    assert (dropped, tokens_of(smaller)) == (3, [[9] * 5, [4]])
    store = loaded(smaller)
    assert store.bucket.tolist() == [-1, 3, -1, -1, -1, -1]
    assert store.visits.tolist() == [1, 2, 1, 0, 1, 0]  # what is known of them stays
    assert store.retired.nonzero().flatten().tolist() == [4]


def test_a_bucket_that_never_had_trajectories_stays() -> None:
    """Recipes that ask questions again and replay nothing keep buckets alone."""
    store = make_store()
    store.visit(torch.tensor([2]), torch.tensor([3]), step=1)
    move(store, {2: 3})
    smaller, dropped = prune(snapshot(store, NAMES, vocabulary="v"), step=90, max_age=1)
    assert (dropped, loaded(smaller).bucket.tolist()) == (0, [-1, -1, 3, -1, -1, -1])


@pytest.mark.parametrize(
    ("most", "left"),
    [
        (1, [[5, 6], [8], [4]]),  # the never scored one stays to the last
        (2, [[5, 6], [8], [9] * 5, [4]]),
        (3, [[5, 6, 7], [5, 6], [8], [9] * 5, [4]]),
    ],
)
def test_the_highest_entropy_leaves_a_full_question(small, most: int, left: list) -> None:
    smaller, dropped = prune(small, step=10, max_per_question=most)
    assert (dropped, tokens_of(smaller)) == (5 - len(left), left)


def test_pruning_keeps_what_the_store_itself_would_keep(small) -> None:
    for most in (1, 2, 3):
        store = make_store(max_per_question=most)
        add(store, *STORED)
        smaller, _ = prune(small, step=10, max_per_question=most)
        assert tokens_of(snapshot(store, NAMES)) == tokens_of(smaller)


def test_the_old_make_no_room_for_the_young(small) -> None:
    """Both limits: who is too old is gone before the trajectories of a question are counted."""
    smaller, dropped = prune(small, step=10, max_age=5, max_per_question=1)
    assert (dropped, tokens_of(smaller)) == (3, [[9] * 5, [4]])


def test_everything_may_go(small) -> None:
    smaller, dropped = prune(small, step=100, max_age=0)
    store = loaded(smaller)
    assert (dropped, store.num_trajectories, len(store)) == (5, 0, 0)
    assert stats(smaller, step=100)["trajectories"] == 0


def test_the_snapshot_itself_is_left_alone(small) -> None:
    before = stats(small, step=10)
    prune(small, step=10, max_age=0, max_per_question=1)
    assert stats(small, step=10) == before
