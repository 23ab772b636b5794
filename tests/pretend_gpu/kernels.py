"""Launches of Triton kernels: what a real launcher refuses, then Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pretend_gpu.cuda_api import PROPERTIES
from pretend_gpu.tensor import CUDA, PretendTensor, values_of
from pretend_gpu.waits import place_of_caller
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction


class StubDriver:
    """As much of Triton's driver as its launcher and its autotuner ask for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return CUDA

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: [1.0 for _ in quantiles]  # nothing is timed here


@contextlib.contextmanager
def launched_on(gpu: Any) -> Iterator[None]:
    """Kernels take pretended tensors, and no tensor of the host beside one."""
    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        names = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        if any(isinstance(x, PretendTensor) for x in tensors):
            for name, value in names.items():
                if isinstance(value, Tensor) and not isinstance(value, PretendTensor):
                    raise ValueError(
                        f"Pointer argument {name} of {executor.fn.__name__} cannot be accessed "
                        f"from Triton (cpu tensor?): {place_of_caller()}"
                    )
        run(executor, *map(values_of, args), **{k: values_of(v) for k, v in kwargs.items()})

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(driver, "_active", StubDriver(90)),
    ):
        yield


# ---- compiled instead of run ---------------------------------------------------------------------

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # that a block may have, by capability


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[dict[str, set[int]]]:
    """Launches are compiled by Triton's own launcher and not run: outputs hold anything. Needs
    TRITON_INTERPRET=0. Kernel -> the specialisations that were made of it."""
    found: dict[str, set[int]] = defaultdict(set)
    run = JITFunction.run
    sizes = {**vars(PROPERTIES), "shared_memory_per_block_optin": SHARED_BYTES[capability]}

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = {name: values_of(value) for name, value in kwargs.items()}
        made = run(kernel, *map(values_of, args), grid=grid, warmup=True, **given)
        found[kernel.fn.__name__].add(id(made))
        return made

    with (
        mock.patch.object(driver, "_active", StubDriver(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(**sizes)),
        mock.patch.object(
            torch, "_assert_async", lambda *args: None
        ),  # of outputs that hold anything
    ):
        yield found
