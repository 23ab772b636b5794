"""Experiences by hand and by chance, and what a store holds as plain values, for its tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from exgrpo_fast.experience.replay.plan import StorePlan
from exgrpo_fast.experience.replay.snapshot import stored_rows
from exgrpo_fast.experience.replay.store import COLUMNS, Experiences, ExperienceStore
from exgrpo_fast.model.packing import Ragged

POISON = 0x0BAD


@dataclass(frozen=True)
class Item:
    """One trajectory. Floats are multiples of 1/64, which every type here keeps as they are."""

    question: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()  # by default they follow from the tokens
    entropy: float = float("inf")
    birth_step: int = 0
    reward: float = 1.0
    success: bool = True
    truncated: bool = False
    group: int = 0
    score: float = 0.0
    advantage: float = 0.0

    def __post_init__(self) -> None:
        if not self.logprobs:
            values = tuple(-(token % 100 + 1) / 64 for token in self.tokens)
            object.__setattr__(self, "logprobs", values)


SCALARS = [field.name for field in fields(Item) if field.name not in ("tokens", "logprobs")]
DTYPES = {"question": torch.int64, "birth_step": torch.int64, "group": torch.int64} | {
    name: COLUMNS[name]
    for name in ("entropy", "reward", "success", "truncated", "score", "advantage")
}


def experiences(items: Sequence[Item]) -> Experiences:
    return Experiences(
        tokens=Ragged.of([item.tokens for item in items]),
        logprobs=torch.tensor([x for item in items for x in item.logprobs]),
        **{
            name: torch.tensor([getattr(item, name) for item in items], dtype=DTYPES[name])
            for name in SCALARS
        },
    )


def items_of(found: Experiences) -> list[Item]:
    tokens, logprobs = found.tokens.values.tolist(), found.logprobs.tolist()
    ends = found.tokens.lengths.cumsum(0).tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    columns = [getattr(found, name).tolist() for name in SCALARS]
    return [
        Item(
            tokens=tuple(tokens[part]),
            logprobs=tuple(logprobs[part]),
            **dict(zip(SCALARS, values, strict=True)),
        )
        for part, *values in zip(parts, *columns, strict=True)
    ]


def contents(store: ExperienceStore) -> list[Item]:
    """Everything stored, in the order of arrival."""
    return items_of(store.read(stored_rows(store)))


def of_question(store: ExperienceStore, question: int) -> list[Item]:
    return [item for item in contents(store) if item.question == question]


def known_of_questions(store: ExperienceStore) -> dict[str, list]:
    names = ("bucket", "successes", "visits", "last_visit", "retired")
    return {name: getattr(store, name).tolist() for name in names}


def everything(store: ExperienceStore) -> tuple:
    """All that a store is by what it documents; compared before and after what must change nothing."""
    serials = store.rows["serial"][stored_rows(store)].tolist()
    counters = (store.next_serial, store.num_evicted)
    return contents(store), serials, known_of_questions(store), counters


def make_store(
    *,
    questions: int = 6,
    trajectories: int = 64,
    pages: int = 128,
    page_tokens: int = 4,
    max_tokens: int = 16,
    host_pages: int = 0,
    group_size: int = 4,
    logprob_dtype: torch.dtype = torch.float32,
    **settings,
) -> ExperienceStore:
    plan = StorePlan(
        questions, trajectories, pages, page_tokens, max_tokens, logprob_dtype.itemsize, host_pages
    )
    return ExperienceStore(plan, group_size=group_size, **settings)


def add(store: ExperienceStore, *items: Item) -> None:
    store.add(experiences(items))
    store.check_valid()


def move(store: ExperienceStore, buckets: dict[int, int]) -> None:
    store.move(torch.tensor(list(buckets)), torch.tensor(list(buckets.values())))


def random_item(rng: random.Random, *, questions: int, max_tokens: int, vocabulary: int) -> Item:
    """Short ones of few tokens are often equal."""
    length = rng.choice([1, 1, 2, 2, 3, rng.randint(1, max_tokens), max_tokens])
    return Item(
        question=rng.randrange(questions),
        tokens=tuple(rng.randrange(vocabulary) for _ in range(length)),
        logprobs=tuple(-rng.randrange(1, 640) / 64 for _ in range(length)),
        entropy=rng.choice([float("inf"), rng.randrange(8) / 8, rng.randrange(640) / 64]),
        birth_step=rng.randrange(1000),
        reward=rng.randrange(65) / 64,
        success=rng.random() < 0.5,
        truncated=rng.random() < 0.2,
        group=rng.randrange(40),
        score=0.0,
    )


def poison(store: ExperienceStore) -> None:
    """Wrong values into all that nobody uses: free rows, free pages, the ends of last pages."""
    alive = store.rows["question"] >= 0
    for name, values in store.rows.items():
        if name != "question":
            values.masked_fill_(~alive, True if values.dtype == torch.bool else POISON)
    # Digests that are stored: a free row must not pass for a copy.
    stored = store.rows["digest"][alive]
    if len(stored):
        store.rows["digest"][~alive] = stored[torch.arange(int((~alive).sum())) % len(stored)]
    store.table[~alive] = POISON
    for pages, on_host in ((store.pages, False), (store.host_pages, True)):
        rows = alive & (store.rows["on_host"] == on_host)
        unused = torch.ones(pages.tokens.shape, dtype=torch.bool).flatten()
        lengths = store.rows["length"][rows].long()
        if len(lengths):
            unused[pages._addresses(store.table[rows], lengths)] = False
        pages.tokens.view(-1)[unused] = -POISON
        pages.logprobs.view(-1)[unused] = float("nan")
