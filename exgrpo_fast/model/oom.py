"""Out of memory on the device: retry the same work in smaller pieces, or fail with a table of what
held the memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line

T = TypeVar("T")
log = logging.getLogger(__name__)
ONE_PACK = (
    "train.gradient_release does not let an update be parted; raise train.minibatches, lower "
    "model.tile_tokens, or set it to false"
)


class OutOfMemory(UserError):
    """There is nothing smaller to try; `table` says what used the memory."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


def until_it_fits(
    work: Callable[[], T], shrink: Callable[[str], None], *, during: str, device: torch.device
) -> T:
    """What `work` returns. After each out-of-memory error `shrink` is called with the allocator's
    message; it makes the pieces smaller, or raises."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            cause = first_line(error)
        # outside the handler, whose traceback holds the tensors of the failed attempt
        shrink(cause)
        log.warning("out of memory in %s, done again in smaller pieces: %s", during, cause)
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Extent(NamedTuple):
    """Tokens of the sequences that are to be read, their prompts included."""

    longest: int  # sequence
    total: int  # each prompt once


class BatchLimits:
    """How much the passes of scoring and of the update take at a time; sizes that fit stay.

    Where memory runs out, chunks of logits get half as large once, then packs, time and again,
    until each sequence has a pack of its own.
    """

    def __init__(self, *, max_tokens_per_microbatch: int, chunk_rows: int | None = None) -> None:
        """`chunk_rows`: at most so many rows of logits; None: as many as the kernels choose."""
        self.asked_microbatch = self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.asked_chunk_rows = self.chunk_rows = chunk_rows
        self.chunk_halvings = self.microbatch_halvings = 0
        self.one_pack = False  # an update is at most one pack on each rank
        self.are_fixed = False

    def shrink(self, extent: Extent, *, rows_at_once: int) -> bool:
        """Whether there was something to halve. `rows_at_once`: of logits, so far."""
        if rows_at_once > 1 and self.chunk_rows == self.asked_chunk_rows:
            self.chunk_rows = rows_at_once // 2
            self.chunk_halvings += 1
            return True
        if not self.one_pack and self.max_tokens_per_microbatch > extent.longest:
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
        """A size whose key the user has changed since is ignored."""
        asked, fitting = state["microbatch"]
        if asked == self.asked_microbatch and not self.one_pack:
            self.max_tokens_per_microbatch = fitting
        asked, fitting = state["chunk_rows"]
        if asked == self.asked_chunk_rows:
            self.chunk_rows = fitting


class Reader(Protocol):
    """The part of a policy that this module uses."""

    model: Any
    device: torch.device
    sizes: BatchLimits

    def all_or_none(self, passes: Callable[[], T]) -> T:
        """What `passes` returns, on all ranks; torch.OutOfMemoryError on all where one has run out."""
        ...

    def chunk_rows(self) -> int:
        """Rows of logits that are held at a time, of a whole micro-batch."""
        ...


def retry_smaller_on_oom(
    policy: Reader,
    work: Callable[[], T],
    of: Callable[[], Extent],
    *,
    during: str,
    undo: Callable[[], None] = lambda: None,
    has_gradients: bool = False,
) -> T:
    """What `work` returns, a run of passes over sequences of this extent.

    Where the memory of a device runs out, all ranks do all of it again with smaller `policy.sizes`;
    `undo` drops what the failed attempt has left behind. OutOfMemory when each pack already holds
    a single sequence.
    """
    if policy.sizes.are_fixed:
        return policy.all_or_none(work)

    def shrink(cause: str) -> None:
        undo()
        asked, sizes = of(), policy.sizes
        if sizes.shrink(asked, rows_at_once=policy.chunk_rows()):
            return
        if sizes.one_pack:
            why = ONE_PACK
        else:
            why = not_even_one(
                asked.longest, "rollout.max_completion_tokens or replay.store.max_gib"
            )
        held = "none" if not has_gradients else "head" if sizes.one_pack else "all"
        raise nothing_smaller(
            policy.model,
            during=during,
            why=why,
            longest=asked.longest,
            cause=cause,
            gradients=held,
        )

    return until_it_fits(
        lambda: policy.all_or_none(work), shrink, during=during, device=policy.device
    )


def not_even_one(longest: int, keys: str) -> str:
    """`keys` of the config to lower."""
    return f"not even one sequence of {longest} tokens fits; lower {keys}, or take a smaller model"


def nothing_smaller(
    model: Any,
    *,
    during: str,
    why: str,
    longest: int,
    cause: str,
    gradients: Literal["none", "head", "all"] = "none",
) -> OutOfMemory:
    """For work on `model` whose longest sequence has so many tokens; `gradients`: those it makes."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = {"weights": weights}
    if gradients == "all":
        held["gradients"] = trained
    elif gradients == "head":
        weight = model.get_output_embeddings().weight
        held["gradient of the head"] = weight.numel() * weight.element_size()
    held["two AdamW moments"] = 2 * trained
    lines = [f"{name:<20}{size / 2**30:9.2f} GiB" for name, size in held.items()]
    lines += [f"{'one sequence':<20}{longest:9d} tokens", f"{'the allocator':<20} {cause}"]
    return OutOfMemory(
        f"out of memory in {during}: {why}", "\n".join(["what used the memory", *lines])
    )
