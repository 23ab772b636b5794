"""What held the memory when it ran out. Loads no torch."""

from __future__ import annotations

from typing import Any

from exgrpo_fast.errors import UserError


class OutOfMemory(UserError):
    """Even one sequence by itself does not fit; `table` says what used the memory."""

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


def out_of_memory(model: Any, *, longest: int, cause: str, releases: bool = False) -> OutOfMemory:
    """For a training step on `model` whose longest sequence has so many tokens; `releases`:
    gradients, so that the update was one pack."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings().weight
    gradients = ("gradients", trained)
    if releases:
        gradients = ("gradient of the head", head.numel() * head.element_size())
    rows = [
        ("weights", weights),
        gradients,
        ("two AdamW moments", 2 * trained),
    ]
    lines = [f"{name:<20}{size / 2**30:9.2f} GiB" for name, size in rows]
    lines += [f"{'one sequence':<20}{longest:9d} tokens", f"{'the allocator':<20} {cause}"]
    message = (
        f"out of memory in the update: not even one sequence of {longest} tokens fits; lower "
        f"rollout.max_completion_tokens or replay.store.max_gib, or take a smaller model"
    )
    if releases:
        message = (
            "out of memory in the update, which train.gradient_release does not let be parted; raise "
            "train.minibatches, lower model.tile_tokens, or set train.gradient_release to false"
        )
    return OutOfMemory(message, "what used the memory\n" + "\n".join(lines))
