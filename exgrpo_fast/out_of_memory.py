"""Where a device's memory runs out: the same work once more in smaller pieces, as long as there are
smaller ones, and then an end that says what held the memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from exgrpo_fast.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)
KEYS_OF_PASSES = (
    "rollout.max_completion_tokens or replay.store.max_gib",
    "train.max_tokens_per_microbatch",
)


class OutOfMemory(UserError):
    """There is nothing smaller to try; `table` says what used the memory."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


def until_it_fits(
    work: Callable[[], T], give_way: Callable[[str], None], *, during: str, device: torch.device
) -> T:
    """What `work` returns. Each time memory runs out in it, `give_way` makes its pieces smaller, or
    raises; it is told the allocator's line."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            cause = str(error).splitlines()[0]
        # outside the handler, whose traceback holds the tensors of the failed attempt
        give_way(cause)
        log.warning("out of memory in %s, done again in smaller pieces: %s", during, cause)
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Extent(NamedTuple):
    """Tokens of the sequences that are to be read, their prompts included."""

    longest: int  # sequence
    total: int  # each prompt once


class PassSizes:
    """How much the passes of scoring and of the update take at a time; sizes that fit stay.

    Where memory runs out, chunks of logits get half as large once, then packs, time and again,
    until each sequence has a pack of its own.
    """

    def __init__(self, *, max_tokens_per_microbatch: int, chunk_rows: int | None = None) -> None:
        """`chunk_rows`: at most so many rows of logits; None: as many as the kernels choose."""
        self.asked_microbatch = self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.asked_chunk_rows = self.chunk_rows = chunk_rows
        self.chunk_halvings = self.microbatch_halvings = 0
        self.are_fixed = False

    def give_way(self, extent: Extent, *, rows_at_once: int) -> bool:
        """Whether there was something to halve. `rows_at_once`: of logits, so far."""
        if rows_at_once > 1 and self.chunk_rows == self.asked_chunk_rows:
            self.chunk_rows = rows_at_once // 2
            self.chunk_halvings += 1
            return True
        if self.max_tokens_per_microbatch > extent.longest:
            half = min(self.max_tokens_per_microbatch, extent.total) // 2
            self.max_tokens_per_microbatch = max(half, extent.longest)
            self.microbatch_halvings += 1
            return True
        return False

    @contextlib.contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, memory that runs out is torch's own error, and nothing is halved."""
        self.are_fixed = True
        try:
            yield
        finally:
            self.are_fixed = False

    def take_halvings(self) -> tuple[int, int]:
        """Of (chunks of logits, packs), since the last call."""
        found = self.chunk_halvings, self.microbatch_halvings
        self.chunk_halvings = self.microbatch_halvings = 0
        return found

    # --- persistence ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "microbatch": [self.asked_microbatch, self.max_tokens_per_microbatch],
            "chunk_rows": [self.asked_chunk_rows, self.chunk_rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A size that the user has set to another value since is not taken up."""
        asked, fitting = state["microbatch"]
        if asked == self.asked_microbatch:
            self.max_tokens_per_microbatch = fitting
        asked, fitting = state["chunk_rows"]
        if asked == self.asked_chunk_rows:
            self.chunk_rows = fitting


class Reader(Protocol):
    """What makes passes: a policy."""

    model: Any
    device: torch.device
    sizes: PassSizes
    processes: Any  # `count`: 1 where no other one is in the middle of the same passes

    def chunk_rows(self) -> int:
        """Rows of logits that are held at a time, of a whole micro-batch."""
        ...


def in_pieces_that_fit(
    policy: Reader,
    work: Callable[[], T],
    of: Callable[[], Extent],
    *,
    during: str,
    undo: Callable[[], None] = lambda: None,
    has_gradients: bool = False,
) -> T:
    """What `work` returns, a run of passes over sequences of this extent.

    Where the device's memory runs out, all of it is done again with smaller `policy.sizes`; `undo`
    drops what the failed attempt has left behind. OutOfMemory when each sequence has a pack of its
    own already, and where other processes have not run out: they are in the middle of theirs.
    """
    if policy.sizes.are_fixed:
        return work()
    is_alone = policy.processes.count == 1

    def give_way(cause: str) -> None:
        undo()
        asked = of()
        if is_alone and policy.sizes.give_way(asked, rows_at_once=policy.chunk_rows()):
            return
        raise nothing_smaller(
            policy.model,
            during=during,
            longest=asked.longest,
            cause=cause,
            is_alone=is_alone,
            keys=KEYS_OF_PASSES,
            has_gradients=has_gradients,
        )

    return until_it_fits(work, give_way, during=during, device=policy.device)


def nothing_smaller(
    model: Any,
    *,
    during: str,
    longest: int,
    cause: str,
    is_alone: bool,
    keys: tuple[str, str],
    has_gradients: bool = False,
) -> OutOfMemory:
    """For work on `model` whose longest sequence has so many tokens. `keys` of the config to lower:
    where the process is alone, and among several, which try nothing smaller."""
    why = (
        f"not even one sequence of {longest} tokens fits; lower {keys[0]}, or take a smaller model"
        if is_alone
        else f"with several processes nothing smaller is tried; lower {keys[1]}"
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = {"weights": weights, "gradients": trained, "two AdamW moments": 2 * trained}
    if not has_gradients:
        del held["gradients"]
    lines = [f"{name:<20}{size / 2**30:9.2f} GiB" for name, size in held.items()]
    lines += [f"{'one sequence':<20}{longest:9d} tokens", f"{'the allocator':<20} {cause}"]
    return OutOfMemory(
        f"out of memory in {during}: {why}", "\n".join(["what used the memory", *lines])
    )
