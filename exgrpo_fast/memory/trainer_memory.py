"""What the trainer holds: weights, gradients and states for the whole run, activations and the
chunk of logits during an update.

The update peaks at the second of several packs, when all gradients are there: in the forward pass,
in the loss, or in the backward pass, whichever is largest. Where gradients are released, an update
is one pack, and of all gradients the head's alone stays; the one being made is among what the
backward pass holds, with or without release.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from exgrpo_fast.memory.tracing import Passes
from exgrpo_kernels import runtime
from exgrpo_kernels.distillation_loss import BUFFERS
from exgrpo_kernels.sparse_backward import num_tiles

# Of a trained weight, between two updates: exgrpo_fast/training/optim/adamw.py. flashoptim keeps a 16-bit residual
# and two moments of 8 bits with a 16-bit scale for each 32; torchao two moments of 8 bits with a
# 32-bit scale for each 256.
STATE_BYTES = {
    "adamw": 8.0,
    "flash_adamw": 2 + 2 * (1 + 2 / 32),
    "adamw_8bit": 2 * (1 + 4 / 256),
}
# 4 bits, a scale of 8 bits for each 64, whose own 32-bit scale serves 256 of them.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Columns of the loss, its per-token results, ids and positions: 21 vectors of 4 or 8 bytes.
BYTES_PER_ROW = 104


class Head(NamedTuple):
    vocabulary: int
    width: int
    is_trained: bool


@dataclass(frozen=True)
class States:
    """Bytes that stay for the whole run; gradients from the first pack to the update."""

    weights: float
    optimiser: float
    references: float
    gradients: float

    @property
    def resident(self) -> float:
        return self.weights + self.optimiser + self.references


def states(
    passes: Passes, *, weights: torch.dtype, optimiser: str, references: float, is_nf4: bool
) -> States:
    """`references`: bytes of the frozen copies."""
    size = weights.itemsize
    if passes.frozen:  # adapters, float32
        frozen = size * passes.frozen
        if is_nf4:
            frozen -= (size - NF4_BYTES) * passes.quantisable
        held, trained = frozen + 4 * passes.trained, 4 * passes.trained
    else:
        held = trained = size * passes.trained
    return States(
        weights=held,
        optimiser=STATE_BYTES[optimiser] * passes.trained,
        references=references,
        gradients=trained,
    )


def frozen_copy(passes: Passes, weights: torch.dtype, compute: torch.dtype) -> float:
    """Bytes of a whole model that is not trained: exgrpo_fast/model/frozen.py."""
    parameters = passes.frozen or passes.trained
    saved = max(0, weights.itemsize - compute.itemsize) * passes.quantisable
    return weights.itemsize * parameters - saved


def released(held: States, head: Head, weights: torch.dtype) -> States:
    """The same with the gradient of the head alone: exgrpo_fast/training/optim/gradient_release.py."""
    return replace(held, gradients=head.vocabulary * head.width * weights.itemsize)


@dataclass(frozen=True)
class Update:
    """Bytes of one pack beside weights, gradients and states: each part, and their peak."""

    saved: float  # from the forward pass to the backward pass
    chunk: float  # the buffer of logits
    head_gradient: float  # dX and sum of dW, and the head in the compute dtype
    forward: float
    loss: float
    backward: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.loss, self.backward)


@dataclass(frozen=True)
class PackShape:
    """A pack whose tokens are all completion tokens, in the worst case, and how it is computed."""

    tokens: int
    weights: torch.dtype  # as a pass sees them
    compute: torch.dtype
    device: Literal["cpu", "cuda"]
    chunk_rows: int | None = None  # as the loss takes it

    @property
    def rows_at_once(self) -> int:
        return min(self.tokens, self.chunk_rows or self.tokens)

    def rows_and_cast(self, head: Head) -> tuple[int, int]:
        """Bytes of the hidden states that the loss takes, and of the head cast to the compute dtype."""
        size = self.compute.itemsize
        cast = head.vocabulary * head.width * size if self.weights != self.compute else 0
        return self.tokens * head.width * size, cast


def update(passes: Passes, head: Head, pack: PackShape) -> Update:
    size, columns = head.vocabulary * head.width, BYTES_PER_ROW * pack.tokens
    rows, cast = pack.rows_and_cast(head)
    # dW is summed in float32: in the gradient itself where that is float32
    total = 4 * size if head.is_trained and pack.weights.itemsize < 4 else 0
    chunk = chunk_bytes(pack.rows_at_once, head, pack.compute, pack.device, has_gradient=True)
    return Update(
        saved=passes.saved,
        chunk=chunk,
        head_gradient=cast + rows + total,
        forward=passes.forward + columns,
        loss=passes.saved + cast + rows + total + chunk + columns,
        backward=passes.backward + columns,
    )


def scoring(passes: Passes, head: Head, pack: PackShape) -> float:
    """Peak of log-probs under the present weights; `passes` at as many tokens."""
    rows, cast = pack.rows_and_cast(head)
    chunk = chunk_bytes(pack.rows_at_once, head, pack.compute, pack.device)
    return BYTES_PER_ROW * pack.tokens + max(passes.scoring, rows + cast + chunk)


def beside_a_teacher(made: Update, head: Head, pack: PackShape) -> Update:
    """`made` with a divergence over the vocabulary in the loss, the teacher's weights apart.

    There are its hidden states, its head in the compute dtype, a second gradient of the hidden states,
    and after the chunk of logits one of both distributions. `head`: the policy's, for the teacher's too.
    """
    rows, cast = pack.rows_and_cast(head)
    row_bytes = BUFFERS * 4 * head.vocabulary
    count = runtime.chunk_rows(pack.rows_at_once, row_bytes, torch.device(pack.device))
    chunk = max(made.chunk, count * row_bytes)
    return replace(
        made,
        chunk=chunk,
        forward=made.forward + rows,
        loss=made.loss - made.chunk + chunk + 2 * rows + cast,
        backward=made.backward + rows,
    )


def chunk_bytes(
    num_rows: int,
    head: Head,
    compute: torch.dtype,
    device: Literal["cpu", "cuda"],
    *,
    has_gradient: bool = False,
) -> int:
    """The kernels' own choice. On a CPU logits are float32, a block of scratch joins them, and
    bfloat16 operands are widened: the rows of the chunk, and the head tile by tile. With a gradient
    the rows that have one are gathered, and theirs is made in float32; where the backward pass may be
    sparse, the rows of the chunk are gathered as well, and the masses of its tiles are kept."""
    low = compute == torch.bfloat16
    row_bytes = head.vocabulary * (2 if low and device == "cuda" else 4)
    rows = runtime.chunk_rows(num_rows, row_bytes, torch.device(device))
    if device == "cuda":
        return rows * row_bytes
    scratch = runtime.block_rows(rows, row_bytes) * row_bytes
    if low:
        scratch += 2 * min(runtime.TILE_BYTES, 4 * head.vocabulary * head.width)
    if low or has_gradient:
        scratch += 4 * rows * head.width
    if has_gradient:
        scratch += compute.itemsize * rows * head.width
        if head.vocabulary >= runtime.SPARSE_VOCABULARY:
            scratch += compute.itemsize * rows * head.width + 4 * rows * num_tiles(head.vocabulary)
    return rows * row_bytes + scratch
