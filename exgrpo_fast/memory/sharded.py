"""One rank of FSDP2: its shards of weights and states, and what is gathered for a pass.

    head         weight in the compute dtype, float32 gradient; gathered for all passes of an update
    embedding    weight in the compute dtype; gathered from the forward to the backward pass
    layers       two at a time: one that computes, one that is being gathered
    gradients    of one layer in the compute dtype, and of the one before in float32, being reduced
                 and scattered; at the end those of the embedding

A pass sees weights of the compute dtype, whatever dtype the shards have. Communication itself is not
counted: NCCL's buffers are outside torch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from exgrpo_fast.memory.tracing import Passes
from exgrpo_fast.memory.trainer_memory import Head, States


def share(held: States, count: int) -> States:
    """Of one rank of `count`."""
    return States(
        weights=held.weights / count,
        optimiser=held.optimiser / count,
        references=held.references / count,
        gradients=held.gradients / count,
    )


@dataclass(frozen=True)
class Gathered:
    """Bytes of gathered tensors, beside the shards."""

    head: float
    head_gradient: float
    embedding: float
    two_layers: float
    layer_gradients: float  # in the compute dtype
    reduced_gradients: float  # of a layer, float32
    embedding_gradient: float  # float32; the one in the compute dtype is the backward pass's own

    @property
    def for_scoring(self) -> float:
        """During all passes."""
        return self.head + self.embedding

    @property
    def for_update(self) -> float:
        """During all passes of an update."""
        return self.head + self.head_gradient + self.embedding


def gathered(
    passes: Passes,
    head: Head,
    *,
    layers: int,
    is_tied: bool,
    compute: torch.dtype,
    device: str = "cuda",
) -> Gathered:
    """`head`: of the model, as large as its embedding; `layers`: how many, alike in size."""
    size, matrix = compute.itemsize, head.vocabulary * head.width
    # Gradients are cast to float32 as they are copied for the reduction: on a GPU by one kernel, on a
    # CPU in a second copy (torch's `_chunk_cat`).
    leaving = 4 if device == "cuda" or compute == torch.float32 else 4 + size
    outside = matrix * (1 if is_tied else 2)
    layer = (passes.frozen + passes.trained - outside) / layers
    trained = (passes.trained - (outside if head.is_trained else 0)) / layers
    return Gathered(
        head=size * matrix,
        head_gradient=4 * matrix if head.is_trained else 0,
        embedding=size * matrix,
        two_layers=2 * size * layer,
        layer_gradients=size * trained,
        reduced_gradients=leaving * trained,
        embedding_gradient=leaving * matrix if head.is_trained else 0,
    )


def with_layers(passes: Passes, whole: Gathered) -> Passes:
    """What the passes hold while layer after layer is gathered.

    A forward pass begins with the embedding twice: as gathered, and in the layout it is used in. The
    backward pass of the last layer is taken for that of any layer; what exceeds it is the embedding's.
    """
    layer = whole.two_layers + whole.layer_gradients + whole.reduced_gradients
    end = whole.embedding_gradient - whole.embedding  # freed before its gradient is reduced
    return replace(
        passes,
        forward=max(passes.forward, whole.embedding) + whole.two_layers,
        backward_top=passes.backward_top + layer,
        backward_rest=passes.backward_rest + max(whole.reduced_gradients, end),
        scoring=max(passes.scoring, whole.embedding) + whole.two_layers,
    )
