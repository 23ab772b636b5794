"""The experience store: what goes in comes out, who leaves and when, and what is refused.

tests/experience/replay/test_store_model.py holds the same rules against a plain model over long random runs.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from store_cases import (
    Item,
    add,
    contents,
    everything,
    experiences,
    items_of,
    make_store,
    move,
    of_question,
    poison,
    random_item,
)

from exgrpo_fast.experience.replay.snapshot import stored_rows
from exgrpo_fast.experience.replay.store import scramble, token_digests
from exgrpo_fast.model.packing import Ragged

INF = float("inf")


def scored(question: int, entropies: str, *, pages: int = 1) -> list[Item]:
    """'2 1 inf': trajectories of so many pages of 4 tokens, with these entropies."""
    return [
        Item(question, (number, *[0] * (4 * pages - 1)), entropy=float(entropy))
        for number, entropy in enumerate(entropies.split())
    ]


def entropies(store, question: int) -> list[float]:
    return [item.entropy for item in of_question(store, question)]


# --- in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_column_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    store = make_store(trajectories=80, pages=200, logprob_dtype=dtype, deduplicate=False)
    kept = [random_item(rng, questions=6, max_tokens=16, vocabulary=2**31 - 1) for _ in range(60)]
    if dtype == torch.bfloat16:  # eight bits of a fraction
        kept = [
            replace(item, logprobs=tuple(-i / 4 for i in range(len(item.tokens)))) for item in kept
        ]
    kept = [
        replace(item, score=rng.randrange(64) / 64, group=2**40 + i) for i, item in enumerate(kept)
    ]
    for start in range(0, 60, 7):
        add(store, *kept[start : start + 7])
    assert contents(store) == kept
    found = store.read(stored_rows(store))
    assert (found.question.dtype, found.birth_step.dtype) == (torch.int64, torch.int64)
    assert (found.tokens.values.dtype, found.logprobs.dtype) == (torch.int32, torch.float32)
    assert found.tokens.lengths.device.type == "cpu"
    assert store.num_trajectories == 60


def test_the_caller_keeps_no_hand_on_what_is_stored() -> None:
    store, new = make_store(), experiences([Item(0, (1, 2)), Item(1, (3,))])
    before = items_of(new)
    store.add(new)
    for tensor in (new.tokens.values, new.logprobs, new.question, new.entropy, new.group):
        tensor.fill_(77)
    assert contents(store) == before
    store.read(stored_rows(store)).tokens.values.fill_(88)
    assert contents(store) == before


def test_some_of_many_experiences_are_picked_with_all_their_columns() -> None:
    rng = random.Random(1)
    all_of_them = [random_item(rng, questions=6, max_tokens=9, vocabulary=50) for _ in range(12)]
    picked = experiences(all_of_them).pick(torch.tensor([7, 0, 7, 11]))
    assert items_of(picked) == [all_of_them[i] for i in (7, 0, 7, 11)]
    assert len(picked) == 4


def test_trajectories_of_some_questions_come_by_question_then_by_arrival() -> None:
    store = make_store(trajectories=8)
    add(store, Item(2, (1,)), Item(0, (2,)), Item(5, (3,)), Item(2, (4,)))
    store.retire(torch.tensor([5]))
    # Rows that were free again: later arrivals lie before earlier ones.
    add(store, *[Item(0, (10 + i,)) for i in range(3)], Item(2, (20,)), Item(1, (21,)))
    rows, owner = store.rows_of(torch.tensor([2, 4, 0]))
    found = items_of(store.read(rows))
    assert [(item.question, item.tokens) for item in found] == [
        (2, (1,)), (2, (4,)), (2, (20,)), (0, (2,)), (0, (10,)), (0, (11,)), (0, (12,)),
    ]  # fmt: skip
    assert owner.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert rows.tolist() != sorted(rows.tolist())
    assert [len(part) for part in store.rows_of(torch.tensor([4]))] == [0, 0]
    assert [len(part) for part in store.rows_of(torch.tensor([], dtype=torch.int64))] == [0, 0]
    assert store.num_rows_of_question().tolist() == [4, 1, 3, 0, 0, 0]


def test_an_empty_store_is_read_as_nothing() -> None:
    store = make_store()
    assert contents(store) == [] and len(store) == 0 and store.num_trajectories == 0
    assert store.bucket_sizes() == [0] * 5
    add(store)  # an empty list
    assert everything(store) == everything(make_store())


def test_what_is_stored_does_not_depend_on_the_order_of_the_groups() -> None:
    rng = random.Random(2)
    groups = [
        [replace(random_item(rng, questions=1, max_tokens=8, vocabulary=2), question=q)] * 2
        + [random_item(rng, questions=1, max_tokens=8, vocabulary=2) for _ in range(q % 2)]
        for q in range(6)
    ]
    groups = [[replace(item, question=q) for item in group] for q, group in enumerate(groups)]
    ours, theirs = make_store(), make_store()
    add(ours, *[item for group in groups for item in group])
    rng.shuffle(groups)
    add(theirs, *[item for group in groups for item in group])
    for question in range(6):
        assert of_question(ours, question) == of_question(theirs, question) != []


# --- copies ---------------------------------------------------------------------------------------


def test_of_equal_tokens_the_first_is_kept() -> None:
    store = make_store()
    first, other = Item(0, (5, 6), (-1.0, -2.0), birth_step=1), Item(0, (5,), birth_step=2)
    copies = [replace(first, logprobs=(-9.0, -9.0), birth_step=step) for step in range(3, 9)]
    add(store, first, copies[0], other, copies[1])
    assert contents(store) == [first, other]
    add(store, copies[2], replace(other, birth_step=9))
    add(store, replace(first, tokens=(7, 7)), *copies[3:])
    assert contents(store) == [first, other, replace(first, tokens=(7, 7))]
    assert store.num_evicted == 0


def test_tokens_that_differ_in_anything_are_no_copies() -> None:
    store = make_store(pages=256, trajectories=128)
    sequences = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    different = [Item(q, (5, *tokens)) for tokens in sequences for q in (0, 1)]
    different += [Item(0, tokens) for tokens in ((0,), (0, 0), (0, 0, 0), (1, 2, 3), (3, 2, 1))]
    different += [Item(0, (2**31 - 1,)), Item(0, (2**31 - 1, 0)), Item(1, (0,))]
    add(store, *different)
    assert contents(store) == different
    add(store, *reversed(different))
    assert contents(store) == different


def test_copies_are_found_among_many_short_ones() -> None:
    rng = random.Random(3)
    store = make_store(trajectories=400, pages=800)
    expected: dict[tuple, Item] = {}
    for _ in range(40):
        items = [random_item(rng, questions=6, max_tokens=3, vocabulary=2) for _ in range(10)]
        for item in items:
            expected.setdefault((item.question, item.tokens), item)
        store.add(experiences(items))
    assert contents(store) == list(expected.values())
    assert 50 < len(expected) < 100


def test_without_deduplication_every_copy_is_kept() -> None:
    store, item = make_store(deduplicate=False), Item(0, (5, 6))
    add(store, item, item)
    add(store, item)
    assert contents(store) == [item] * 3


def test_what_left_the_store_may_come_again() -> None:
    store = make_store(trajectories=2, pages=2, evict="oldest")
    items = [Item(0, (i,)) for i in range(3)]
    for item in [*items, items[0]]:
        add(store, item)
    assert contents(store) == [items[2], items[0]]
    store = make_store()
    add(store, *items)
    store.drop(torch.arange(64) < 2)  # and their rows, with their digests, lie there unused
    add(store, items[1], items[2])
    assert contents(store) == [items[2], items[1]]


def reference_scramble(value: int) -> int:
    """splitmix64 of Steele, Lea, Flood, in whole numbers modulo 2^64."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    value ^= value >> 31
    return value - 2**64 if value >= 2**63 else value


def test_scrambling_is_splitmix64() -> None:
    values = [0, 1, 2, 12345, 2**31 - 1, 7 << 32, 2**63 - 1, -1, -(2**63)]
    assert scramble(torch.tensor(values)).tolist() == [reference_scramble(v) for v in values]
    assert reference_scramble(0) % 2**64 == 0xE220A8397B1DCDAF  # published first output of seed 0


def test_a_digest_is_a_sum_over_tokens_and_places() -> None:
    def expected(tokens: list[int]) -> int:
        parts = [reference_scramble(token + (i << 32)) for i, token in enumerate(tokens)]
        total = (sum(parts) + reference_scramble(len(tokens))) % 2**64
        return total - 2**64 if total >= 2**63 else total

    sequences = [[5, 6, 7], [7, 6, 5], [0], [0, 0], [2**31 - 1] * 9]
    found = token_digests(Ragged.of(sequences)).tolist()
    assert found == [expected(tokens) for tokens in sequences]
    assert len(set(found)) == 5


# --- questions ------------------------------------------------------------------------------------


def test_a_question_lies_in_the_bucket_it_was_moved_to_last() -> None:
    store = make_store()
    add(store, Item(0, (1,)), Item(3, (1,)), Item(4, (1,)))
    assert len(store) == 0  # nothing was said about them
    move(store, {0: 1, 3: 3, 4: 1})
    assert store.bucket_sizes() == [0, 2, 0, 1, 0] and len(store) == 3
    assert store.by_bucket().tolist() == [1, 2, 5, 0, 4, 3]
    move(store, {0: 3})
    assert store.bucket.tolist() == [3, -1, -1, 3, 1, -1]
    assert store.by_bucket().tolist() == [1, 2, 5, 4, 0, 3]
    move(store, {4: 0, 3: 4})
    assert store.bucket_sizes() == [1, 0, 0, 1, 1]
    store.check_valid()


def test_visits_are_counted_with_their_latest_outcome() -> None:
    store = make_store()
    store.visit(torch.tensor([4, 1]), torch.tensor([2, 3]), step=7)
    store.visit(torch.tensor([1, 0]), torch.tensor([0, 4]), step=9)
    assert store.visits.tolist() == [1, 2, 0, 0, 1, 0]
    assert store.successes.tolist() == [4, 0, 0, 0, 2, 0]
    assert store.last_visit.tolist() == [9, 9, 0, 0, 7, 0]
    store.visit(torch.tensor([2, 2]), torch.tensor([1, 1]), step=10)  # two groups of one step
    assert store.visits.tolist() == [1, 2, 2, 0, 1, 0]
    assert len(store) == 0, "a visit alone stores nothing"


def test_a_retired_question_leaves_for_good() -> None:
    store = make_store()
    kept = [Item(1, (1,)), Item(5, (2, 3)), Item(0, (4,))]
    add(store, Item(2, (1,)), kept[0], Item(2, (2,)), kept[1], kept[2])
    move(store, {0: 1, 1: 2, 2: 2, 5: 3})
    store.visit(torch.tensor([2]), torch.tensor([4]), step=3)
    store.retire(torch.tensor([2, 4]))
    store.check_valid()
    assert contents(store) == kept
    assert store.retired.tolist() == [False, False, True, False, True, False]
    assert store.bucket.tolist() == [1, 2, -1, -1, -1, 3]
    # Neither new experience nor a new bucket brings it back, and others of the batch still come.
    add(store, Item(2, (9,)), Item(3, (9,)), Item(4, (1,)), Item(2, (9,)))
    move(store, {2: 1, 3: 1})
    assert contents(store) == [*kept, Item(3, (9,))]
    assert store.bucket.tolist() == [1, 2, -1, 1, -1, 3]
    assert (store.visits[2], store.successes[2], store.num_evicted) == (1, 4, 0)


def test_retiring_the_last_question_spares_free_rows() -> None:
    """Free rows have question -1, which as an index is the last one."""
    store = make_store()
    add(store, Item(0, (1,)))
    store.retire(torch.tensor([5]))
    assert contents(store) == [Item(0, (1,))]
    add(store, Item(5, (1,)), Item(1, (1,)))
    assert [item.question for item in contents(store)] == [0, 1]


def test_a_question_whose_trajectories_are_dropped_leaves_its_bucket() -> None:
    store = make_store()
    add(store, Item(0, (1,)), Item(1, (1,)), Item(0, (2,)))
    move(store, {0: 1, 1: 2, 3: 2})  # of question 3 none was ever kept
    rows = stored_rows(store)
    gone = torch.zeros(64, dtype=torch.bool)
    gone[rows[:2]] = True
    store.drop(gone)
    assert store.bucket.tolist() == [1, -1, -1, 2, -1, -1]
    assert contents(store) == [Item(0, (2,))]
    store.check_valid()


def test_a_new_entropy_is_noted_where_it_belongs() -> None:
    store = make_store()
    add(store, *scored(0, "1 2 3"), *scored(1, "4"))
    rows, _ = store.rows_of(torch.tensor([1, 0]))
    store.note_entropy(rows[[2, 0]], torch.tensor([0.5, 9.0], dtype=torch.float64))
    assert entropies(store, 0) == [1, 0.5, 3] and entropies(store, 1) == [9]


# --- a full store ---------------------------------------------------------------------------------


def test_the_highest_last_known_entropy_leaves_a_full_store() -> None:
    store = make_store(trajectories=5, pages=99)
    add(store, *scored(0, "2 1 inf 3 0.5"))
    add(store, Item(1, (1,), entropy=7.0))
    assert entropies(store, 0) == [2, 1, INF, 0.5] and store.num_evicted == 1
    add(store, Item(2, (1,)), Item(2, (2,)))  # 7 and 2 leave, not what never was scored
    assert entropies(store, 0) == [1, INF, 0.5]
    assert entropies(store, 1) == [] and entropies(store, 2) == [INF] * 2
    assert store.num_evicted == 3
    rows, _ = store.rows_of(torch.tensor([0]))
    store.note_entropy(rows, torch.tensor([1.0, 8.0, 0.5]))  # what counts is the last known
    add(store, Item(3, (1,)))
    assert entropies(store, 0) == [1, 0.5] and store.num_evicted == 4
    assert len(contents(store)) == 5


def test_of_equal_entropies_the_older_leaves_first() -> None:
    store = make_store(trajectories=4)
    add(store, *scored(0, "1 1"))
    add(store, *scored(1, "inf inf"))
    add(store, Item(2, (1,)))
    assert [item.tokens[0] for item in of_question(store, 0)] == [1]
    add(store, Item(2, (2,)), Item(2, (3,)))
    assert [item.tokens[0] for item in contents(store)] == [1, 1, 2, 3]
    assert len(of_question(store, 0)) == 0


def test_the_oldest_leaves_a_full_store_of_that_kind() -> None:
    store = make_store(trajectories=4, evict="oldest")
    add(store, *scored(0, "1 9 inf"))
    add(store, *scored(1, "5"))
    add(store, Item(2, (1,)), Item(2, (2,)))
    assert entropies(store, 0) == [INF] and entropies(store, 1) == [5]
    assert store.num_evicted == 2


def test_pages_run_out_before_rows() -> None:
    store = make_store(trajectories=50, pages=8)
    add(store, *scored(0, "3 2", pages=2), *scored(1, "1 4 0"))
    add(store, Item(2, tuple(range(13))))  # four pages; one is free
    # 4 (one page) and 3 (two pages) leave: no more than has to.
    assert entropies(store, 0) == [2] and entropies(store, 1) == [1, 0]
    assert of_question(store, 2) == [Item(2, tuple(range(13)))]
    assert store.num_evicted == 2


def test_who_leaves_for_the_pages_leaves_for_the_rows_too() -> None:
    store = make_store(trajectories=4, pages=8)
    add(store, *scored(0, "4 3 2 1", pages=2))
    add(store, Item(1, (1,) * 8), Item(1, (2,) * 8))
    assert entropies(store, 0) == [2, 1] and store.num_evicted == 2
    add(store, Item(2, (1,)), Item(2, (2,)), Item(2, (3,)))  # two pages are short, but three rows
    assert entropies(store, 0) == [] and [i.tokens[0] for i in of_question(store, 1)] == [2]
    assert store.num_evicted == 5


def test_a_question_left_empty_by_eviction_leaves_its_bucket() -> None:
    store = make_store(trajectories=3)
    add(store, *scored(0, "9"), *scored(1, "8 1"))
    move(store, {0: 1, 1: 3})
    add(store, Item(2, (1,)), Item(2, (2,)))
    assert store.bucket.tolist() == [-1, 3, -1, -1, -1, -1]
    assert entropies(store, 0) == [] and entropies(store, 1) == [1]


def test_a_large_full_store_lets_go_of_one_in_fifty_at_once() -> None:
    store = make_store(trajectories=200, pages=400, evict="oldest")
    kept = [Item(0, (i,)) for i in range(206)]
    add(store, *kept[:200])
    add(store, kept[200])
    assert contents(store) == kept[4:201] and store.num_evicted == 4
    for item in kept[201:204]:
        add(store, item)
    assert contents(store) == kept[4:204], "there was room"
    add(store, *kept[204:])
    assert contents(store) == kept[8:] and store.num_evicted == 8


@pytest.mark.parametrize("host_pages", [0, 6])
def test_a_batch_as_large_as_the_store_is_kept_whole(host_pages: int) -> None:
    store = make_store(trajectories=6, pages=12, host_pages=host_pages)
    add(store, *scored(0, "1 2 inf", pages=2), *scored(1, "inf inf"))
    batch = [Item(2, (i,) * 8) for i in range(6)]
    add(store, *batch)
    assert of_question(store, 2) == batch
    assert len(contents(store)) == 6


def test_rows_and_pages_are_found_again() -> None:
    """A small store lives through many copies and refused questions without losing anything."""
    store = make_store(trajectories=8, pages=16)
    kept = [*scored(0, "1 2 inf", pages=2), *scored(1, "3")]
    add(store, *kept)
    store.retire(torch.tensor([3]))
    move(store, {0: 1, 1: 2})
    for i in range(300):
        poison(store)
        store.add(experiences([kept[i % 4], Item(3, (i,) * 8), kept[(i + 1) % 4]]))
    store.check_valid()
    assert contents(store) == kept
    assert (store.num_evicted, store.next_serial) == (0, 904)
    assert store.bucket_sizes() == [0, 1, 1, 0, 0]
    for i in range(100):  # and through questions that come and go
        store.retired[4] = False
        add(store, Item(4, (i,) * 12), Item(4, (i,)))
        store.retire(torch.tensor([4]))
    assert contents(store) == kept and store.num_evicted == 0


def test_a_question_keeps_its_best_few() -> None:
    store = make_store(max_per_question=2)
    add(store, *scored(0, "3 1 2"), *scored(1, "5"))
    assert entropies(store, 0) == [1, 2] and entropies(store, 1) == [5]
    add(store, Item(0, (8,), entropy=1.5), Item(1, (8,)))
    assert entropies(store, 0) == [1, 1.5] and entropies(store, 1) == [5, INF]
    add(store, Item(1, (9,)))  # the first of those never scored stays
    assert [item.tokens[0] for item in of_question(store, 1)] == [8, 9]
    add(store, Item(1, (10,)))
    assert [item.tokens[0] for item in of_question(store, 1)] == [8, 9]
    assert store.num_evicted == 4


def test_a_question_keeps_its_newest_few() -> None:
    store = make_store(max_per_question=2, evict="oldest")
    add(store, *scored(0, "1 2 3 0"), *scored(1, "5"))
    assert entropies(store, 0) == [3, 0]
    add(store, Item(0, (8,), entropy=9.0))
    assert entropies(store, 0) == [0, 9] and entropies(store, 1) == [5]
    assert store.num_evicted == 3


def test_the_groups_of_the_highest_score_stay() -> None:
    store = make_store(max_groups=2)

    def group(number: int, question: int, score: float, size: int) -> list[Item]:
        return [Item(question, (number, i), group=number, score=score) for i in range(size)]

    add(store, *group(0, 0, 1.5, 2), *group(1, 1, 0.5, 3), *group(2, 2, 1.0, 1))
    move(store, {0: 1, 2: 1})
    assert {item.group for item in contents(store)} == {0, 2}
    assert store.num_trajectories == 3
    add(store, *group(3, 3, 1.0, 4))  # of equals the newer one
    assert {item.group for item in contents(store)} == {0, 3}
    assert of_question(store, 3) == group(3, 3, 1.0, 4)
    assert store.bucket.tolist() == [1, -1, -1, -1, -1, -1]
    add(store, *group(4, 4, 0.25, 4))
    assert {item.group for item in contents(store)} == {0, 3}


# --- the host's pages -----------------------------------------------------------------------------


def test_cold_trajectories_move_to_the_host_and_come_back_as_they_were() -> None:
    store = make_store(trajectories=64, pages=8, host_pages=40)
    rng, kept = random.Random(4), []
    for number in range(20):
        item = random_item(rng, questions=6, max_tokens=16, vocabulary=1000)
        kept.append(replace(item, tokens=(number, *item.tokens[1:])))
        add(store, kept[-1])
        poison(store)
        assert contents(store) == kept, number
    rows = stored_rows(store)
    pages = store.pages.pages_for(store.rows["length"][rows])
    on_host = store.rows["on_host"][rows]
    assert pages.sum() > 8 >= pages[~on_host].sum() > 0, "more than the device holds"
    assert store.num_evicted == 0
    mixed = rows[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert items_of(store.read(mixed)) == [kept[int(rows.tolist().index(r))] for r in mixed]
    assert items_of(store.read(rows[on_host])) == [
        k for k, h in zip(kept, on_host, strict=True) if h
    ]
    # Copies of what lies on the host are copies still.
    add(store, *[replace(item, birth_step=5) for item in kept[:3]])
    assert contents(store) == kept


def on_host(store) -> list[int]:
    """First tokens of what lies there."""
    rows = stored_rows(store)
    return [item.tokens[0] for item in items_of(store.read(rows[store.rows["on_host"][rows]]))]


def test_the_coldest_move_first_and_the_coldest_of_a_full_host_leave() -> None:
    store = make_store(trajectories=64, pages=4, host_pages=3)
    add(store, *scored(0, "2 4 3 1"))
    add(store, Item(1, (10,), entropy=0.5))
    assert on_host(store) == [1] and store.num_evicted == 0
    add(store, Item(1, (11,), entropy=0.25), Item(1, (12,), entropy=5.0))
    assert on_host(store) == [0, 1, 2] and store.num_evicted == 0
    add(store, Item(1, (13,), entropy=0.125))  # 5 moves in, 4 leaves
    assert on_host(store) == [0, 2, 12] and store.num_evicted == 1
    assert entropies(store, 0) == [2, 3, 1]
    assert entropies(store, 1) == [0.5, 0.25, 5, 0.125]


def test_of_more_than_the_host_can_hold_the_coldest_leave() -> None:
    store = make_store(trajectories=64, pages=8, host_pages=3)
    add(store, *scored(0, "8 7 6 5 4 3 2 1"))
    add(store, *[Item(1, (10 + i,)) for i in range(6)])
    assert entropies(store, 0) == [5, 4, 3, 2, 1] and store.num_evicted == 3
    assert on_host(store) == [3, 4, 5]


def test_a_trajectory_longer_than_the_host_leaves() -> None:
    store = make_store(trajectories=64, pages=4, host_pages=1)
    add(store, *scored(0, "1", pages=3), *scored(1, "0.5"))
    add(store, Item(2, (1,)))
    assert entropies(store, 0) == [] and entropies(store, 1) == [0.5]
    assert on_host(store) == [] and store.num_evicted == 1


def test_no_more_leave_than_must_when_rows_and_host_are_full() -> None:
    store = make_store(trajectories=6, pages=4, host_pages=2)
    add(store, *scored(0, "6 5 4 3"))
    add(store, *[Item(1, (10 + i,), entropy=1.0 + i) for i in range(2)])
    assert on_host(store) == [0, 1] and store.num_trajectories == 6
    add(store, Item(2, (1,)), Item(2, (2,)))
    # Two pages are wanted: 4 and 3 take the places of 6 and 5, whose rows are the two wanted.
    assert entropies(store, 0) == [4, 3] and entropies(store, 1) == [1, 2]
    assert store.num_evicted == 2


def test_retiring_frees_the_pages_of_the_host_too() -> None:
    store = make_store(trajectories=64, pages=4, host_pages=4)
    add(store, *scored(0, "9 8 7 6"))
    add(store, *scored(1, "4 3 2 1"))
    assert on_host(store) == [0, 1, 2, 3]
    store.retire(torch.tensor([0]))
    poison(store)
    add(store, *scored(2, "0 0 0 0"))
    assert entropies(store, 1) == [4, 3, 2, 1] and len(on_host(store)) == 4
    assert store.num_evicted == 0


# --- what nobody wrote is never read --------------------------------------------------------------


@pytest.mark.parametrize("host_pages", [0, 12])
def test_values_in_unused_places_never_come_back(host_pages: int) -> None:
    rng = random.Random(5)
    store = make_store(trajectories=20, pages=24, host_pages=host_pages, max_per_question=9)
    for step in range(80):
        poison(store)
        items = [random_item(rng, questions=6, max_tokens=16, vocabulary=50) for _ in range(4)]
        add(store, *items)
        if step % 10 == 9:
            store.retire(torch.tensor([step // 10 % 6]))
            store.retired.fill_(False)
        poison(store)
        for item in contents(store):
            assert all(0 <= token < 50 for token in item.tokens)
            assert all(-10 <= x < 0 for x in item.logprobs)
            assert item.birth_step < 1000 and 0 <= item.question < 6 and item.group < 40
            assert item.entropy == INF or item.entropy < 11


# --- bad input ------------------------------------------------------------------------------------


def with_column(name: str, values: list) -> dict:
    return {name: torch.tensor(values)}


BAD = {
    "too long": (
        dict(tokens=Ragged.of([[1] * 17, [2]]), logprobs=torch.zeros(18)),
        "a trajectory of 17 tokens; the store takes at most 16",
    ),
    "empty": (
        dict(tokens=Ragged.of([[1, 2, 3], []]), logprobs=torch.zeros(3)),
        "without tokens",
    ),
    "lengths that do not add up": (
        dict(tokens=Ragged(torch.tensor([1, 2, 3]), torch.tensor([2, 2])), logprobs=torch.zeros(3)),
        "do not add up",
    ),
    "negative question": (
        with_column("question", [1, -1]),
        "question -1 is unknown: .* 6 questions",
    ),
    "large question": (with_column("question", [6, 1]), "question 6 is unknown: .* 6 questions"),
    "nan": (with_column("logprobs", [-1.0, float("nan"), -1.0]), "log-prob is not finite"),
    "infinite": (with_column("logprobs", [-1.0, -1.0, -INF]), "log-prob is not finite"),
    "nan reward": (with_column("reward", [float("nan"), 1.0]), "reward or an entropy is not a num"),
    "nan entropy": (with_column("entropy", [1.0, float("nan")]), "reward or an entropy is not"),
    "a long column": (with_column("entropy", [1.0, 1.0, 1.0]), "columns .* differ in length"),
    "a short column": (with_column("success", [True]), "columns .* differ in length"),
    "missing log-probs": (with_column("logprobs", [-1.0, -1.0]), "columns .* differ in length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_changes_nothing(name: str) -> None:
    changes, message = BAD[name]
    store = make_store()
    add(store, Item(0, (1, 2)), Item(1, (3,)))
    move(store, {0: 1})
    before = everything(store)
    good = experiences([Item(0, (5, 6)), Item(1, (7,))])
    with pytest.raises(ValueError, match=message):
        store.add(replace(good, **changes))
    store.check_valid()
    assert everything(store) == before
    store.add(good)
    assert store.num_trajectories == 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([Item(2, (i,)) for i in range(7)], "7 trajectories of 7 pages at once; .* 6 and 10"),
        ([Item(2, (i,) * 9) for i in range(4)], "4 trajectories of 12 pages at once; .* 6 and 10"),
    ],
)
def test_a_batch_larger_than_the_store_is_refused_and_changes_nothing(
    batch: list[Item], message: str
) -> None:
    store = make_store(trajectories=6, pages=10, host_pages=20)
    add(store, *scored(0, "1 2"))
    move(store, {0: 1})
    before = everything(store)
    with pytest.raises(ValueError, match=message):
        store.add(experiences(batch))
    store.check_valid()
    assert everything(store) == before


def test_groups_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        make_store(group_size=1)


def corrupted_bucket(store) -> None:
    store.bucket[0] = 5


def retired_with_bucket(store) -> None:
    store.retired[0], store.bucket[0] = True, 1


def retired_with_trajectories(store) -> None:
    store.retired[0] = True


def shared_page(store) -> None:
    store.table[1, 0] = store.table[0, 0]


def free_row_in_use(store) -> None:
    store._free_rows = torch.arange(64)


def free_page_in_use(store) -> None:
    store.pages._free = torch.arange(128, dtype=torch.int32)


@pytest.mark.parametrize(
    "damage",
    [corrupted_bucket, retired_with_bucket, retired_with_trajectories, shared_page]
    + [free_row_in_use, free_page_in_use],
)
def test_the_check_of_the_store_sees_damage(damage) -> None:
    store = make_store()
    add(store, Item(0, (1,)), Item(1, (1,)))
    damage(store)
    with pytest.raises(AssertionError):
        store.check_valid()


@pytest.mark.parametrize(("spare", "kept"), [(0.5, [3, 5, 8, 9]), (0.0, [6, 7, 8, 9])])
def test_the_newest_stay_and_a_share_of_older_correct_ones(spare: float, kept: list[int]) -> None:
    """Positive bias of arXiv 2604.08706, in one go and one at a time."""
    correct = [1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    items = [
        Item(question=i % 3, tokens=(i + 1,), birth_step=i, success=bool(c))
        for i, c in enumerate(correct)
    ]
    for parts in ([items], [[item] for item in items]):
        store = make_store(max_trajectories=4, spare_correct=spare)
        for part in parts:
            store.add(experiences(part))
        alive = store.rows["question"] >= 0
        assert sorted(store.rows["birth_step"][alive].tolist()) == kept
        store.check_valid()
