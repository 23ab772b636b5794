"""What Triton's interpreter needs to stand in for a GPU: right roundings, any order of programs,
and half its time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def prepare_interpreter() -> None:
    install_bfloat16_rounding()
    install_one_patch_a_launch()


def make_libdevice() -> SimpleNamespace:
    """The functions of libdevice that flashoptim uses, which the interpreter does not have."""
    return SimpleNamespace(
        pow=lambda x, y: tl.exp2(y * tl.log2(0.0 * y + x)),
        copysign=lambda x, y: tl.where(y < 0, -tl.abs(x), tl.abs(x)),
    )


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


def install_one_patch_a_launch() -> None:
    """A launch patches `triton.language` once; the functions that the kernel calls find it patched.

    The interpreter patches it again at each of those calls, which changes nothing and takes longer
    than the arithmetic of blocks as small as those of the tests.
    """
    executor: Any = interpreter.GridExecutor
    if getattr(executor, "patches_once", False):
        return
    patch_language, launch = interpreter._patch_lang, executor.__call__
    patched: set[str] = set()

    @functools.cache
    def languages_of(function: Any) -> set[str]:
        return {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}

    def patch_once(function: Any) -> Any:
        if languages_of(function) <= patched:
            return None
        patched.update(languages_of(function))
        return patch_language(function)

    def launch_once(self, *arguments, **named):
        try:
            launch(self, *arguments, **named)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    executor.__call__, executor.patches_once = launch_once, True


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
