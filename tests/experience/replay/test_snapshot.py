"""The store on disk: it comes back as it was, or not at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from store_cases import (
    Item,
    add,
    contents,
    everything,
    known_of_questions,
    make_store,
    move,
    of_question,
    poison,
    random_item,
)

from exgrpo_fast.experience.replay import snapshot as snapshot_module
from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot, stored_rows
from exgrpo_fast.experience.replay.store import ExperienceStore
from exgrpo_fast.run.checkpoint.format import merge_tensors, split_tensors

NAMES = [f"q{i}" for i in range(6)]
INF = float("inf")


def small_store(**settings) -> ExperienceStore:
    sizes: dict[str, Any] = {"trajectories": 24, "pages": 48}
    return make_store(**(sizes | settings))


def saved(store: ExperienceStore, names: list[str] = NAMES, **settings) -> dict[str, Any]:
    """A snapshot that went through a checkpoint's two files."""
    plain, tensors = split_tensors(snapshot(store, names, **settings))
    return merge_tensors(json.loads(json.dumps(plain)), tensors)


def load(
    store: ExperienceStore, state: dict[str, Any], names: list[str] = NAMES, **settings
) -> ExperienceStore:
    load_snapshot(store, state, {name: i for i, name in enumerate(names)}, **settings)
    store.check_valid()
    return store


def filled(**settings) -> ExperienceStore:
    """Evictions, copies, a retired question, one that failed, one in a bucket without anything."""
    rng, store = random.Random(0), small_store(**settings)
    for step in range(12):
        items = [random_item(rng, questions=4, max_tokens=16, vocabulary=9) for _ in range(4)]
        items = [replace(item, group=step, score=step / 4) for item in items]
        add(store, *items)
    move(store, {0: 1, 1: 3, 2: 1, 5: 2})
    store.visit(torch.tensor([0, 1, 3, 4]), torch.tensor([1, 3, 4, 0]), step=11)
    store.visit(torch.tensor([1, 2]), torch.tensor([3, 1]), step=12)
    store.retire(torch.tensor([3]))
    assert store.num_evicted > 0 and store.next_serial == 48 > store.num_trajectories > 10
    return store


def order_of_candidates(store: ExperienceStore) -> list[int]:
    rows, _ = store.rows_of(torch.tensor([2, 0, 1]))
    return store.rows["serial"][rows].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_comes_back_as_it_was(dtype: torch.dtype) -> None:
    store = filled(logprob_dtype=dtype)
    state = saved(store)
    other = small_store(logprob_dtype=dtype)
    add(other, Item(5, (1, 2, 3)), Item(3, (1,)))  # what was there before is gone
    move(other, {4: 2})
    other.visit(torch.tensor([5]), torch.tensor([2]), step=3)
    other.retire(torch.tensor([0]))
    load(other, state)
    assert everything(other) == everything(store)
    assert order_of_candidates(other) == order_of_candidates(store)
    assert other.bucket_sizes() == store.bucket_sizes() == [0, 2, 1, 1, 0]


def test_a_loaded_store_goes_on_as_the_saved_one() -> None:
    ours = filled()
    theirs = load(small_store(), saved(ours))
    poison(theirs)
    rng = random.Random(1)
    for _ in range(20):
        items = [random_item(rng, questions=6, max_tokens=16, vocabulary=9) for _ in range(5)]
        add(ours, *items)
        add(theirs, *items)
        assert everything(theirs) == everything(ours)


def test_saving_changes_nothing_and_shares_nothing() -> None:
    store = filled()
    before = everything(store)
    state = snapshot(store, NAMES)
    for value in [*state["trajectories"].values(), *state["of_question"].values()]:
        value.fill_(1)
    state["token_ids"].fill_(1)
    state["behaviour_logprobs"].fill_(1)
    assert everything(store) == before


def test_questions_are_known_by_their_names() -> None:
    """Another run may read its data in another order, and have more of it."""
    store = filled()
    names = ["new", "q5", "q3", "q0", "newer", "q1", "q4", "q2"]
    other = make_store(questions=8, trajectories=24, pages=48)
    load(other, saved(store), names)
    place = {i: names.index(name) for i, name in enumerate(NAMES)}
    moved = [replace(item, question=place[item.question]) for item in contents(store)]
    assert contents(other) == moved
    ours, theirs = known_of_questions(store), known_of_questions(other)
    for column in ours:
        assert [theirs[column][place[i]] for i in range(6)] == ours[column], column
        assert [theirs[column][i] for i in (0, 4)] == [(-1 if column == "bucket" else 0)] * 2
    back = load(small_store(), saved(other, names))
    assert everything(back) == everything(store)


def test_only_questions_of_which_something_is_known_are_named() -> None:
    store = make_store()
    add(store, Item(1, (1,)))
    store.visit(torch.tensor([2]), torch.tensor([0]), step=1)
    store.retire(torch.tensor([5]))
    move(store, {3: 1})
    assert saved(store)["questions"] == ["q1", "q2", "q3", "q5"]
    assert everything(load(make_store(), saved(store), NAMES)) == everything(store)


def test_an_empty_store_can_be_saved() -> None:
    state = saved(make_store())
    assert state["questions"] == [] and len(state["token_ids"]) == 0
    assert everything(load(filled(), state)) == everything(make_store())


def test_log_probs_may_change_their_type() -> None:
    store = filled()
    other = small_store(logprob_dtype=torch.bfloat16)
    load(other, saved(store))
    for ours, theirs in zip(contents(store), contents(other), strict=True):
        rounded = tuple(torch.tensor(ours.logprobs).bfloat16().tolist())
        assert theirs == replace(ours, logprobs=rounded)


# --- the host's pages -----------------------------------------------------------------------------


def spilled() -> ExperienceStore:
    rng = random.Random(2)
    store = make_store(trajectories=40, pages=12, host_pages=40)
    for number in range(40):
        item = random_item(rng, questions=6, max_tokens=16, vocabulary=99)
        add(store, replace(item, tokens=(number, *item.tokens[1:])))
    move(store, dict.fromkeys(range(6), 2))
    return store


def pages_in_use(store: ExperienceStore) -> tuple[int, int]:
    """(on the device, on the host)"""
    rows = stored_rows(store)
    pages = store.pages.pages_for(store.rows["length"][rows])
    there = store.rows["on_host"][rows]
    return int(pages[~there].sum()), int(pages[there].sum())


def test_a_spilled_store_comes_back_though_the_device_does_not_hold_it() -> None:
    store = spilled()
    assert pages_in_use(store)[0] > 9 and pages_in_use(store)[1] > 36, "both are full"
    other = load(make_store(trajectories=40, pages=12, host_pages=40), saved(store))
    assert everything(other) == everything(store)
    assert pages_in_use(other) == pages_in_use(store)
    poison(other)
    for number in range(10):  # and it goes on as the first one
        for one in (store, other):
            add(one, Item(number % 6, (100 + number,) * 7, entropy=number / 4))
        assert everything(other) == everything(store)


@pytest.mark.parametrize(("pages", "host_pages"), [(60, 0), (60, 4), (8, 60)])
def test_a_spilled_store_may_move_to_one_of_other_sizes(pages: int, host_pages: int) -> None:
    store = spilled()
    other = make_store(trajectories=40, pages=pages, host_pages=host_pages)
    assert everything(load(other, saved(store))) == everything(store)


def test_many_are_loaded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "MOVED_AT_ONCE", 5)
    store = filled()
    assert everything(load(small_store(), saved(store))) == everything(store)
    store = spilled()
    for pages, host_pages in ((12, 40), (60, 4), (60, 0)):
        other = make_store(trajectories=40, pages=pages, host_pages=host_pages)
        assert everything(load(other, saved(store))) == everything(store)


# --- what does not fit ----------------------------------------------------------------------------


def assert_refused(
    state: dict[str, Any], message: str, names: list[str] = NAMES, **settings
) -> None:
    store = small_store(**settings)
    add(store, Item(1, (1, 2)), Item(4, (3,)))
    move(store, {1: 1})
    before = everything(store)
    with pytest.raises(ValueError, match=message) as error:
        load(store, state, names)
    assert "\n" not in str(error.value)
    store.check_valid()
    assert everything(store) == before


def test_another_group_size_is_refused() -> None:
    assert_refused(saved(filled()), "saved with group_size 4, this run has 8", group_size=8)


def test_another_tokenizer_is_refused() -> None:
    state = saved(filled(), vocabulary="words")
    assert_refused(state, "saved with another tokenizer")
    load(small_store(), state, vocabulary="words")


def test_questions_that_the_data_no_longer_has_are_refused() -> None:
    names = ["q0", "q1", "q2", "a", "b", "q5"]
    assert_refused(
        saved(filled()), "knows 2 questions that the data no longer has, such as q3", names
    )


@pytest.mark.parametrize("version", [None, 1, 99])
def test_another_format_is_refused(version: int | None) -> None:
    state = saved(filled()) | {"format": version}
    if version is None:
        del state["format"]
    assert_refused(state, "saved by an early version")
    assert_refused({"group_size": 4, "buckets": {}}, "saved by an early version")


def test_trajectories_too_long_for_this_run_are_refused() -> None:
    message = r"a trajectory of 16 tokens; this run takes at most 12 \(rollout.max_comp"
    assert_refused(saved(filled()), message, max_tokens=12)


def test_more_than_this_run_has_room_for_is_refused() -> None:
    store = filled()
    pages, count = pages_in_use(store)[0], store.num_trajectories
    message = f"holds {count} trajectories of {pages} pages; this run has room for "
    assert_refused(saved(store), f"{message}{count - 1} of 48", trajectories=count - 1)
    assert_refused(saved(store), f"{message}24 of {pages - 1}: raise", pages=pages - 1)
    assert_refused(
        saved(store), f"{message}24 of {pages - 1}: raise", pages=20, host_pages=pages - 21
    )
    exact = make_store(trajectories=count, pages=pages)
    assert everything(load(exact, saved(store))) == everything(store)


Damage = Callable[[dict[str, Any]], None]


def put(path: str, place: int, value: float) -> Damage:
    """Write a wrong value into a column."""

    def damage(state: dict[str, Any]) -> None:
        *outer, name = path.split(".")
        for key in outer:
            state = state[key]
        state[name][place] = value

    return damage


def cut(path: str) -> Damage:
    """Lose the last value of a column."""

    def damage(state: dict[str, Any]) -> None:
        *outer, name = path.split(".")
        for key in outer:
            state = state[key]
        state[name] = state[name][:-1]

    return damage


DAMAGES = {
    "a length that does not add up": put("lengths", 0, 17),
    "no length": put("lengths", 0, 0),
    "a length missing": cut("lengths"),
    "a token missing": cut("token_ids"),
    "a log-prob missing": cut("behaviour_logprobs"),
    "a reward missing": cut("trajectories.reward"),
    "a serial missing": cut("trajectories.serial"),
    "a place missing": cut("trajectories.on_host"),
    "a bucket missing": cut("of_question.bucket"),
    "visits missing": cut("of_question.visits"),
    "a name missing": cut("questions"),
    "a bucket too large": put("of_question.bucket", 1, 5),
    "a bucket too small": put("of_question.bucket", 1, -2),
    "a bucket of a retired question": put("of_question.bucket", 3, 1),
    "trajectories of a retired question": put("of_question.retired", 4, 1),
    "a question too large": put("trajectories.question", 0, 6),
    "a question too small": put("trajectories.question", 0, -1),
    "nan": put("behaviour_logprobs", 2, float("nan")),
    "infinity": put("behaviour_logprobs", 2, -INF),
    "a negative token": put("token_ids", 1, -1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_snapshot_is_refused(name: str) -> None:
    store = filled()
    add(store, Item(4, (1,)))
    state = saved(store)
    assert state["questions"] == NAMES and bool(state["of_question"]["retired"][3])
    DAMAGES[name](state)
    assert_refused(state, "is damaged: lengths, buckets or numbers are wrong")


def test_a_store_of_copies_keeps_them() -> None:
    store = make_store(deduplicate=False)
    add(store, *[Item(0, (1, 2))] * 3)
    assert everything(load(make_store(deduplicate=False), saved(store))) == everything(store)
    assert len(of_question(load(make_store(), saved(store)), 0)) == 1


def test_a_snapshot_of_before_advantages_were_stored_loads_with_zeros() -> None:
    store = make_store()
    add(store, Item(question=1, tokens=(4, 5), advantage=0.5))
    state = snapshot(store, NAMES)
    assert state["trajectories"].pop("advantage").tolist() == [0.5]
    loaded = make_store()
    load_snapshot(loaded, state, {name: i for i, name in enumerate(NAMES)})
    assert contents(loaded) == [Item(question=1, tokens=(4, 5), advantage=0.0)]
