"""Token pages: what is written comes back, and no page belongs to two."""

from __future__ import annotations

import pytest
import torch

from exgrpo_fast.experience.replay.token_pages import TokenPages
from exgrpo_fast.model.packing import Ragged


def random_tokens(lengths: list[int], seed: int) -> tuple[Ragged, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    tokens = torch.randint(0, 2**31 - 1, (count,), generator=generator)
    return Ragged(tokens, torch.tensor(lengths)), -5 * torch.rand(count, generator=generator)


def used(pages: TokenPages, table: torch.Tensor, lengths: torch.Tensor) -> list[int]:
    return [
        page
        for row, count in zip(table.tolist(), pages.pages_for(lengths).tolist(), strict=True)
        for page in row[:count]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_tokens", [1, 3, 8])
def test_what_is_written_is_read(dtype: torch.dtype, page_tokens: int) -> None:
    pages = TokenPages(400, page_tokens, logprob_dtype=dtype)
    generator = torch.Generator().manual_seed(page_tokens)
    parts = []
    for seed in range(4):
        drawn = torch.randint(1, 40, (5,), generator=generator).tolist()
        lengths = [1, page_tokens, 2 * page_tokens, 2 * page_tokens + 1, *drawn][: 9 - seed]
        tokens, logprobs = random_tokens(lengths, seed)
        table = pages.take(tokens.lengths, 40)
        pages.write(table, tokens, logprobs)
        parts.append((table, tokens, logprobs))
    for table, tokens, logprobs in parts:  # after all were written: none wrote over another
        found_tokens, found_logprobs = pages.read(table, tokens.lengths)
        assert found_tokens.dtype == torch.int32 and found_logprobs.dtype == torch.float32
        assert torch.equal(found_tokens.long(), tokens.values)
        assert torch.equal(found_logprobs, logprobs.to(dtype).float())


def test_rows_are_read_in_any_order_and_more_than_once() -> None:
    pages = TokenPages(20, 4)
    tokens, logprobs = random_tokens([5, 1, 8], seed=0)
    table = pages.take(tokens.lengths, 3)
    pages.write(table, tokens, logprobs)
    order = torch.tensor([2, 0, 2, 1])
    found_tokens, found_logprobs = pages.read(table[order], tokens.lengths[order])
    parts, of_parts = tokens.split(), Ragged(logprobs, tokens.lengths).split()
    assert torch.equal(found_tokens.long(), torch.cat([parts[i] for i in order]))
    assert torch.equal(found_logprobs, torch.cat([of_parts[i] for i in order]))


def test_no_rows_are_read_as_nothing() -> None:
    tokens, logprobs = TokenPages(0, 4).read(
        torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0).long()
    )
    assert len(tokens) == len(logprobs) == 0


def test_a_trajectory_takes_the_pages_that_it_needs_and_shares_none() -> None:
    pages = TokenPages(30, 4)
    lengths = torch.tensor([1, 4, 5, 8, 9, 16])
    assert pages.pages_for(lengths).tolist() == [1, 1, 2, 2, 3, 4]
    table = pages.take(lengths, 4)
    assert pages.num_free == 30 - 13
    other = pages.take(lengths, 4)
    assert pages.num_free == 30 - 26
    taken = used(pages, table, lengths) + used(pages, other, lengths)
    assert len(set(taken)) == len(taken) == 26
    assert set(taken).isdisjoint(pages._free.tolist())
    assert set(taken) | set(pages._free.tolist()) == set(range(30))
    assert table[0].tolist()[1:] == [0, 0, 0], "no page where none is needed"


def test_more_pages_than_are_free_are_not_given() -> None:
    pages = TokenPages(3, 4)
    with pytest.raises(AssertionError, match="after room was made"):
        pages.take(torch.tensor([13]), 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_keep_only_frees_exactly_the_others(dtype: torch.dtype) -> None:
    pages = TokenPages(30, 4)
    lengths = torch.tensor([1, 4, 5, 8, 9, 16])
    table = pages.take(lengths, 4)
    kept = torch.tensor([1, 4])
    pages.keep_only(table[kept], lengths[kept].to(dtype))
    in_use = used(pages, table[kept], lengths[kept])
    assert sorted(pages._free.tolist() + in_use) == list(range(30))
    assert pages.num_free == 30 - 4
    # What is taken next leaves the kept ones as they are.
    tokens, logprobs = random_tokens([4, 9], seed=1)
    pages.write(table[kept], tokens, logprobs)
    others, of_others = random_tokens([16] * 6 + [8], seed=2)
    pages.write(pages.take(others.lengths, 4), others, of_others)
    assert pages.num_free == 0
    assert torch.equal(pages.read(table[kept], tokens.lengths)[0].long(), tokens.values)
    pages.keep_only(table[:0], lengths[:0])
    assert pages.num_free == 30


def test_bytes_are_counted() -> None:
    assert TokenPages(10, 4).num_bytes == 10 * 4 * 8
    assert TokenPages(10, 4, logprob_dtype=torch.bfloat16).num_bytes == 10 * 4 * 6
