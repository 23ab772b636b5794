"""One rank of FSDP2: its shards of weights and states, and what is gathered for a pass.

    head         weight in the compute dtype, float32 gradient; gathered for all passes of an update
    embedding    weight in the compute dtype; gathered from the forward to the backward pass
    layers       two at a time: one that computes, one that is being gathered
    gradients    of one layer in the compute dtype, and of the one before in float32, being reduced
                 and scattered; at the end those of the embedding
    released     the head's is scattered before the backward pass, so that its shard alone stays; of
                 the others the shards of one layer exist at a time

A pass sees weights of the compute dtype, whatever dtype the shards have. Communication itself is not
counted: NCCL's buffers are outside torch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from exgrpo_fast.memory.tracing import Passes
from exgrpo_fast.memory.trainer_memory import Head, States, Update


def share(held: States, count: int) -> States:
    """Of one rank of `count`."""
    return States(**{name: num_bytes / count for name, num_bytes in vars(held).items()})


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
    shards_of_layer: float  # of its gradients on one rank, where they are released
    shard_of_head: float  # of the head's or the embedding's
    padded_head: float  # copy of the head's gradient, where its rows do not divide by the ranks

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
    count: int,
    weights: torch.dtype = torch.float32,
    device: str = "cuda",
) -> Gathered:
    """`head`: of the model, as large as its embedding; `layers`: how many, alike in size; `count`:
    ranks; `weights`: dtype of their shards."""
    size, matrix = compute.itemsize, head.vocabulary * head.width
    # Gradients are cast to float32 as they are copied for the reduction: on a GPU by one kernel, on a
    # CPU in a second copy (torch's `_chunk_cat`).
    leaving = 4 if device == "cuda" or compute == torch.float32 else 4 + size
    outside = matrix * (1 if is_tied else 2)
    layer = (passes.frozen + passes.trained - outside) / layers
    trained = (passes.trained - (outside if head.is_trained else 0)) / layers
    shard = 4 + (weights.itemsize if weights != torch.float32 else 0)  # as reduced, and as applied
    return Gathered(
        head=size * matrix,
        head_gradient=4 * matrix if head.is_trained else 0,
        embedding=size * matrix,
        two_layers=2 * size * layer,
        layer_gradients=size * trained,
        reduced_gradients=leaving * trained,
        embedding_gradient=leaving * matrix if head.is_trained else 0,
        shards_of_layer=shard * trained / count,
        shard_of_head=shard * matrix / count if head.is_trained else 0,
        padded_head=0 if head.vocabulary % count == 0 else 4 * matrix,
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


def with_released(passes: Passes, whole: Gathered) -> Passes:
    """`passes` with what the backward pass holds of the gradients it hands out."""
    return replace(
        passes,
        backward_top=passes.backward_top + whole.shards_of_layer,
        backward_rest=passes.backward_rest + max(whole.shards_of_layer, whole.shard_of_head),
    )


def with_scattered_head(made: Update, whole: Gathered) -> Update:
    """`made`, where the gathered gradient of the head is there until the loss is made, and not in the
    backward pass."""
    scattering = made.saved + made.head_gradient + whole.padded_head + whole.shard_of_head
    return replace(
        made,
        forward=made.forward + whole.head_gradient,
        loss=max(made.loss, scattering) + whole.head_gradient,
    )
