"""The size of the store, before it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from store_cases import Item, add, make_store

from exgrpo_fast.experience.replay.plan import StorePlan, StoreTooSmall
from exgrpo_fast.experience.replay.store import ExperienceStore
from exgrpo_fast.experience.replay.token_pages import TokenPages


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (ExperienceStore, TokenPages)):
        yield from tensors_in(vars(value))


def real_bytes(value) -> int:
    """Of the memory behind all tensors, views of one counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(value)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


PLANS = [
    StorePlan(1, 1, 1, 1, 1),
    StorePlan(5, 7, 11, 4, 16),
    StorePlan(100, 33, 77, 16, 100, 2),
    StorePlan(17, 9, 5, 8, 65, 4, 13),
    StorePlan(1000, 256, 300, 256, 8192, 2, 40),
]


@pytest.mark.parametrize("plan", PLANS)
def test_planned_counted_and_real_bytes_are_the_same(plan: StorePlan) -> None:
    store = ExperienceStore(plan, group_size=8)
    host = real_bytes(store.host_pages)
    assert plan.num_bytes == store.num_bytes == real_bytes(store) - host
    assert plan.num_host_bytes == host


def test_a_store_in_use_has_no_more_bytes() -> None:
    store = make_store(trajectories=10, pages=12)
    for i in range(30):
        add(store, Item(i % 6, (i, i + 1)), Item(0, (i,)), Item(1, (7,)))
    assert real_bytes(store) <= store.num_bytes == store.plan.num_bytes


def fit(**changes) -> StorePlan:
    sizes: dict[str, Any] = {
        "num_questions": 1000,
        "trajectories_per_step": 64,
        "num_steps": 20,
        "max_tokens": 300,
        "max_bytes": 2**30,
    }
    return StorePlan.fit(**(sizes | changes))


def test_a_large_budget_holds_exactly_what_the_run_can_bring() -> None:
    plan = fit(page_tokens=64, host_bytes=10_000)
    assert (plan.num_questions, plan.num_trajectories, plan.max_tokens) == (1000, 1280, 300)
    assert plan.pages_per_trajectory == 5 and plan.num_pages == 5 * 1280
    assert plan.num_host_pages == 10_000 // (64 * 8 + 4)
    assert plan.num_host_bytes <= 10_000
    exact = plan.num_bytes
    assert fit(page_tokens=64, max_bytes=exact).num_trajectories == 1280
    assert fit(page_tokens=64, max_bytes=exact).num_pages == 5 * 1280
    assert fit(page_tokens=64, max_bytes=exact - 1).num_pages < 5 * 1280


@pytest.mark.parametrize("page_tokens", [None, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.06, 0.1, 0.3, 0.7, 0.99])
def test_a_smaller_budget_is_used_up_and_holds_a_step_at_its_longest(
    share: float, dtype: torch.dtype, page_tokens: int | None
) -> None:
    sizes = {"logprob_bytes": dtype.itemsize, "page_tokens": page_tokens}
    budget = int(share * fit(**sizes).num_bytes)
    plan = fit(**sizes, max_bytes=budget)
    assert 0.95 * budget <= plan.num_bytes <= budget
    assert 64 <= plan.num_trajectories <= min(1280, plan.num_pages)
    assert plan.num_pages >= 64 * plan.pages_per_trajectory
    assert plan.logprob_bytes == dtype.itemsize


def test_the_least_budget_holds_one_step_and_a_byte_less_is_refused() -> None:
    least = StorePlan(1000, 64, 64 * 5, 64, 300).num_bytes
    plan = fit(page_tokens=64, max_bytes=least)
    assert (plan.num_trajectories, plan.num_pages) == (64, 64 * 5)
    with pytest.raises(StoreTooSmall):
        fit(page_tokens=64, max_bytes=least - 1)


def test_a_budget_too_small_is_answered_with_both_sizes() -> None:
    with pytest.raises(
        StoreTooSmall,
        match=r"one step may bring 1024 trajectories of 8192 tokens, 0\.0628 GiB; "
        r"0\.0312 GiB do not hold them",
    ):
        fit(trajectories_per_step=1024, max_tokens=8192, max_bytes=2**25)


@pytest.mark.parametrize(
    ("max_tokens", "page_tokens"),
    [(1, 16), (12, 16), (128, 16), (129, 32), (256, 32), (257, 64), (1000, 128), (1024, 128)]
    + [(1025, 256), (2048, 256), (2049, 256), (8192, 256), (100_000, 256)],
)
def test_a_page_is_an_eighth_of_the_longest_as_a_power_of_two(
    max_tokens: int, page_tokens: int
) -> None:
    plan = fit(max_tokens=max_tokens, max_bytes=2**40)
    assert plan.page_tokens == page_tokens
    assert plan.pages_per_trajectory == -(-max_tokens // page_tokens)


def test_a_given_page_size_is_taken() -> None:
    plan = fit(page_tokens=7, logprob_bytes=2)
    assert (plan.page_tokens, plan.pages_per_trajectory, plan.page_bytes) == (7, 43, 42)
