"""What Triton's interpreter needs to stand in for a GPU: right roundings, any order of programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the uint16 patterns of bfloat16, to the nearest, as torch rounds."""
    # a copy: 0-d arrays and scalars become arrays that torch can take
    rounded = torch.from_numpy(np.array(values, np.float32, ndmin=1)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy().reshape(np.shape(values))


def install_bfloat16_rounding() -> None:
    """Casts to bfloat16 round to nearest, and products of it are products of its values.

    The interpreter of Triton 3.6 and 3.7 cuts bits off, and multiplies the bit patterns.
    """
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bfloat16", False):
        return
    cast, float_cast = builder.cast_impl, builder.create_fp_to_fp

    def narrows(source: Any, target_type: Any) -> bool:
        return source.dtype.scalar == tl.float32 and target_type.scalar == tl.bfloat16

    def rounded(source: Any) -> Any:
        return interpreter.TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)

    def cast_impl(self, source, target_type):
        return rounded(source) if narrows(source, target_type) else cast(self, source, target_type)

    def create_fp_to_fp(self, source, target_type, mode):
        if narrows(source, target_type):
            return rounded(source)
        return float_cast(self, source, target_type, mode)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = torch.from_numpy(handle.data.copy()).view(torch.bfloat16).float().numpy()
        return interpreter.TensorHandle(values, tl.float32)

    dot = builder.create_dot

    def create_dot(self, a, b, accumulator, *settings):
        # Triton's compiler refuses anything else, its interpreter not in every version
        assert a.dtype.scalar == b.dtype.scalar, f"dot of {a.dtype} and {b.dtype}"
        return dot(self, widened(a), widened(b), accumulator, *settings)

    builder.create_dot = create_dot
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.rounds_bfloat16 = True


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Programs of a one-dimensional grid run in an order drawn from `seed`."""
    builder: Any = interpreter.InterpreterBuilder
    set_grid_idx = builder.set_grid_idx

    def set_shuffled(self, x, y, z):
        order = np.random.default_rng(seed).permutation(self.grid_dim[0])
        set_grid_idx(self, int(order[x]), y, z)

    builder.set_grid_idx = set_shuffled
    try:
        yield
    finally:
        builder.set_grid_idx = set_grid_idx
