"""Long random runs of the store beside a plain model of the same rules: lists, sets, no tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from store_cases import (
    Item,
    contents,
    experiences,
    known_of_questions,
    make_store,
    poison,
    random_item,
)

from exgrpo_fast.experience.replay.plan import StorePlan
from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot, stored_rows
from exgrpo_fast.experience.replay.store import ExperienceStore
from exgrpo_fast.run.checkpoint.format import merge_tensors, split_tensors

QUESTIONS = 8
GROUP_SIZE = 4


@dataclass
class Kept:
    item: Item
    serial: int
    on_host: bool = False


@dataclass
class PlainStore:
    """What `ExperienceStore` documents."""

    plan: StorePlan
    evict: str = "entropy"
    max_per_question: int | None = None
    max_groups: int | None = None
    deduplicate: bool = True
    kept: list[Kept] = field(default_factory=list)  # in the order of arrival
    bucket: list[int] = field(default_factory=lambda: [-1] * QUESTIONS)
    successes: list[int] = field(default_factory=lambda: [0] * QUESTIONS)
    visits: list[int] = field(default_factory=lambda: [0] * QUESTIONS)
    last_visit: list[int] = field(default_factory=lambda: [0] * QUESTIONS)
    retired: list[bool] = field(default_factory=lambda: [False] * QUESTIONS)
    next_serial: int = 0
    num_evicted: int = 0

    def pages(self, kept: Sequence[Kept]) -> int:
        return sum(-(-len(k.item.tokens) // self.plan.page_tokens) for k in kept)

    def coldest_first(self, kept: Sequence[Kept]) -> list[Kept]:
        if self.evict == "oldest":
            return sorted(kept, key=lambda k: k.serial)
        scored = [k for k in kept if k.item.entropy != float("inf")]
        never = [k for k in kept if k.item.entropy == float("inf")]
        return sorted(scored, key=lambda k: (-k.item.entropy, k.serial)) + never

    def leave(self, gone: Sequence[Kept], *, evicted: bool = True) -> None:
        self.num_evicted += len(gone) * evicted
        self.kept = [k for k in self.kept if k not in gone]
        left = {k.item.question for k in self.kept}
        for question in {k.item.question for k in gone} - left:
            self.bucket[question] = -1

    def add(self, items: Sequence[Item]) -> None:
        new = [Kept(item, self.next_serial + i) for i, item in enumerate(items)]
        self.make_room(len(new), self.pages(new))
        self.next_serial += len(new)
        for k in new:
            same = [(o.item.question, o.item.tokens) for o in self.kept] if self.deduplicate else []
            copy = (k.item.question, k.item.tokens) in same
            if not copy and not self.retired[k.item.question]:
                self.kept.append(k)
        if self.max_per_question is not None:
            for question in {item.question for item in items}:
                self.trim(question, self.max_per_question)
        if self.max_groups is not None:
            self.keep_groups(self.max_groups)

    def make_room(self, num_rows: int, num_pages: int) -> None:
        here = [k for k in self.kept if not k.on_host]
        short = num_pages - (self.plan.num_pages - self.pages(here))
        if num_rows <= self.plan.num_trajectories - len(self.kept) and short <= 0:
            return
        if short > 0:
            order = self.coldest_first(here)
            enough = next(n for n in range(len(order) + 1) if self.pages(order[:n]) >= short)
            self.to_host(order[: max(enough, len(order) // 50)])
        rows_short = num_rows - (self.plan.num_trajectories - len(self.kept))
        if rows_short > 0:
            order = self.coldest_first(self.kept)
            self.leave(order[: max(rows_short, len(order) // 50)])

    def to_host(self, moving: list[Kept]) -> None:
        size, moving, gone = self.plan.num_host_pages, list(moving), []
        while self.pages(moving) > size:
            gone.append(moving.pop(0))
        there = self.coldest_first([k for k in self.kept if k.on_host])
        while self.pages(there) + self.pages(moving) > size:
            gone.append(there.pop(0))
        self.leave(gone)
        for k in moving:
            k.on_host = True

    def trim(self, question: int, count: int) -> None:
        mine = [k for k in self.kept if k.item.question == question]
        if self.evict == "oldest":
            self.leave(mine[: max(len(mine) - count, 0)])
        else:  # never scored ones are the last to leave, of equals the first to come
            keys = {k.serial: k.item.entropy for k in mine}
            best = sorted(
                mine, key=lambda k: -1 if keys[k.serial] == float("inf") else keys[k.serial]
            )
            self.leave(best[count:])

    def keep_groups(self, count: int) -> None:
        score = {k.item.group: k.item.score for k in self.kept}
        best = sorted(score, key=lambda group: (-score[group], -group))[:count]
        self.leave([k for k in self.kept if k.item.group not in best], evicted=False)

    def visit(self, questions: list[int], successes: list[int], step: int) -> None:
        for question, count in zip(questions, successes, strict=True):
            self.successes[question], self.last_visit[question] = count, step
            self.visits[question] += 1

    def move(self, questions: list[int], buckets: list[int]) -> None:
        for question, bucket in zip(questions, buckets, strict=True):
            self.bucket[question] = -1 if self.retired[question] else bucket

    def retire(self, questions: list[int]) -> None:
        for question in questions:
            self.retired[question], self.bucket[question] = True, -1
        self.kept = [k for k in self.kept if not self.retired[k.item.question]]

    def note_entropy(self, places: list[int], entropies: list[float]) -> None:
        for place, entropy in zip(places, entropies, strict=True):
            self.kept[place].item = replace(self.kept[place].item, entropy=entropy)


def assert_equal(store: ExperienceStore, plain: PlainStore) -> None:
    store.check_valid()
    assert contents(store) == [k.item for k in plain.kept]
    rows = stored_rows(store)
    assert store.rows["serial"][rows].tolist() == [k.serial for k in plain.kept]
    assert store.rows["on_host"][rows].tolist() == [k.on_host for k in plain.kept]
    for name, values in known_of_questions(store).items():
        assert values == getattr(plain, name), name
    assert (store.next_serial, store.num_evicted) == (plain.next_serial, plain.num_evicted)
    sizes = [plain.bucket.count(bucket) for bucket in range(GROUP_SIZE + 1)]
    assert store.bucket_sizes() == sizes and len(store) == sum(sizes)
    assert store.by_bucket().tolist() == sorted(range(QUESTIONS), key=lambda q: plain.bucket[q])
    asked = [5, 0, 3]
    found, owner = store.rows_of(torch.tensor(asked))
    expected = [(i, k.serial) for i in range(3) for k in plain.kept if k.item.question == asked[i]]
    assert list(zip(owner.tolist(), store.rows["serial"][found].tolist(), strict=True)) == expected


def some_questions(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(QUESTIONS), count)


def change(rng: random.Random, store: ExperienceStore, plain: PlainStore, step: int) -> None:
    """The same random change to both."""
    what = rng.random()
    if what < 0.6:
        items = [
            random_item(rng, questions=QUESTIONS, max_tokens=16, vocabulary=rng.choice([2, 50]))
            for _ in range(rng.choice([1, 1, 2, 4, 8]))
        ]
        if plain.max_groups is not None:  # a group has one score
            items = [replace(item, score=(item.group * 7 % 5) / 4) for item in items]
        store.add(experiences(items))
        plain.add(items)
    elif what < 0.75 and plain.kept:
        places = rng.sample(range(len(plain.kept)), rng.randint(1, len(plain.kept)))
        entropies = [rng.randrange(80) / 16 for _ in places]
        store.note_entropy(stored_rows(store)[places], torch.tensor(entropies))
        plain.note_entropy(places, entropies)
    elif what < 0.85:
        questions = some_questions(rng, 3)
        successes = [rng.randint(0, GROUP_SIZE) for _ in questions]
        store.visit(torch.tensor(questions), torch.tensor(successes), step=step)
        plain.visit(questions, successes, step)
    elif what < 0.95:
        questions = some_questions(rng, 3)
        buckets = [rng.randint(0, GROUP_SIZE) for _ in questions]
        store.move(torch.tensor(questions), torch.tensor(buckets))
        plain.move(questions, buckets)
    elif what < 0.97 and sum(plain.retired) < 3:
        questions = some_questions(rng, 1)
        store.retire(torch.tensor(questions))
        plain.retire(questions)
    else:  # save, and load what was saved
        names = [f"q{i}" for i in range(QUESTIONS)]
        flat, tensors = split_tensors(snapshot(store, names))
        state = merge_tensors(json.loads(json.dumps(flat)), tensors)
        load_snapshot(store, state, {name: i for i, name in enumerate(names)})


SETTINGS = {
    "by entropy": {},
    "the oldest": {"evict": "oldest"},
    "with a host": {"host_pages": 17},
    "with a large host and few rows": {"host_pages": 60, "trajectories": 20, "evict": "oldest"},
    "with a small host": {"host_pages": 3},
    "few rows": {"trajectories": 8, "pages": 100},
    "few of each": {"max_per_question": 3},
    "the newest few of each": {"max_per_question": 2, "evict": "oldest", "host_pages": 9},
    "few groups": {"max_groups": 6},
    "with copies": {"deduplicate": False},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", SETTINGS)
def test_many_random_changes_do_what_the_plain_model_does(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    sizes = {"questions": QUESTIONS, "trajectories": 16, "pages": 32, "group_size": GROUP_SIZE}
    store = make_store(**(sizes | SETTINGS[name]))
    rules = ("evict", "max_per_question", "max_groups", "deduplicate")
    plain = PlainStore(store.plan, **{rule: getattr(store, rule) for rule in rules})
    for step in range(1, 151):
        poison(store)
        change(rng, store, plain, step)
        assert_equal(store, plain)
    assert plain.next_serial > 200
