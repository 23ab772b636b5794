"""Token pages: the token ids and log-probs of many trajectories in pages of a fixed size.

Like the pages of a KV cache: a trajectory takes as many pages as it needs, wherever they are, so
that trajectories of all lengths come and go without holes. Every operation is a tensor operation,
and what it allocates is known on the host: nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exgrpo_fast.model.packing import Ragged, places


class TokenPages:
    """`num_pages` pages of `page_tokens` tokens on one device."""

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        *,
        logprob_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pinned: bool = False,
    ) -> None:
        shape = (num_pages, page_tokens)
        self.page_tokens = page_tokens
        # Zeros, so that the memory is there from the start and not asked for in mid-run.
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=device, pin_memory=pinned)
        self.logprobs = torch.zeros(shape, dtype=logprob_dtype, device=device, pin_memory=pinned)
        self._free = torch.arange(num_pages, dtype=torch.int32, device=device)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tokens, self.logprobs))

    def pages_for(self, lengths: Tensor) -> Tensor:
        return (lengths + self.page_tokens - 1) // self.page_tokens

    def take(self, lengths: Tensor, width: int) -> Tensor:
        """lengths [A] (on the CPU) -> page table int32 [A, width], 0 where no page is needed."""
        needed = self.pages_for(lengths)
        count = int(needed.sum())
        assert count <= self.num_free, "pages are taken only after room was made"
        taken, self._free = self._free[:count], self._free[count:]
        owner, place = places(needed, taken.device)
        table = torch.zeros(len(lengths), width, dtype=torch.int32, device=taken.device)
        table[owner, place] = taken
        return table

    def keep_only(self, table: Tensor, lengths: Tensor) -> None:
        """Every page that no row of the table [A, width] uses is free again."""
        columns = torch.arange(table.shape[1], device=table.device)
        used = columns < self.pages_for(lengths)[:, None]
        free = torch.ones(len(self.tokens), dtype=torch.bool, device=table.device)
        free[table[used].long()] = False
        self._free = free.nonzero().flatten().int()

    def write(self, table: Tensor, tokens: Ragged, logprobs_N: Tensor) -> None:
        at = self._addresses(table, tokens.lengths)
        device = table.device
        values = logprobs_N.to(device, non_blocking=True).to(self.logprobs.dtype)
        self.tokens.view(-1).index_copy_(0, at, tokens.values.to(device, torch.int32))
        self.logprobs.view(-1).index_copy_(0, at, values)

    def read(self, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(token ids int32 [N], log-probs float32 [N]); `lengths` [A] lie on the CPU."""
        at = self._addresses(table, lengths)
        tokens = self.tokens.view(-1).index_select(0, at)
        return tokens, self.logprobs.view(-1).index_select(0, at).float()

    def _addresses(self, table: Tensor, lengths: Tensor) -> Tensor:
        """Where each token lies: a page is one run of addresses."""
        owner, number = places(self.pages_for(lengths), "cpu")
        runs = (lengths[owner] - number * self.page_tokens).clamp(max=self.page_tokens)
        owner, number = (t.to(table.device, non_blocking=True) for t in (owner, number))
        of_run, place = places(runs, table.device)
        first = table[owner, number].long() * self.page_tokens
        return first.index_select(0, of_run) + place
