"""The experience store on the pretend GPU holds what it holds on the CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pretend_gpu.machine import pretend_gpu
from store_cases import everything, experiences, make_store, random_item

from exgrpo_fast.experience.replay.snapshot import stored_rows

SETTINGS: dict[str, dict[str, Any]] = {
    "by entropy": {},
    "with a host": {"host_pages": 17, "evict": "oldest"},
    "few of each": {"max_per_question": 3, "deduplicate": False},
    "few groups": {"max_groups": 6},
}


def after_many_changes(device: str, settings: dict[str, Any]) -> list[Any]:
    """What the store holds after each of 12 steps."""
    rng = random.Random(0)
    store = make_store(questions=8, trajectories=16, pages=32, device=device, **settings)
    held = []
    for step in range(12):
        items = [random_item(rng, questions=8, max_tokens=16, vocabulary=9) for _ in range(4)]
        store.add(experiences(items))
        questions = torch.tensor(rng.sample(range(8), 3))
        counts = torch.tensor([rng.randint(0, 4) for _ in questions])
        store.visit(questions, counts, step=step)
        store.move(questions, counts)
        rows = stored_rows(store)
        store.note_entropy(rows, torch.arange(len(rows)) / 16)
        if step == 5:
            store.retire(torch.tensor([3]))
        if step == 7:
            store.spill()
        store.check_valid()
        held.append(everything(store))
    return held


@pytest.mark.parametrize("name", SETTINGS)
def test_holds_what_it_holds_on_the_cpu(name: str) -> None:
    expected = after_many_changes("cpu", SETTINGS[name])
    with pretend_gpu():
        assert after_many_changes("cuda", SETTINGS[name]) == expected
