"""Launches of Triton kernels: what a real launcher refuses, then Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from pretend_gpu.tensor import PretendTensor, values_of
from pretend_gpu.waits import place_of_caller
from torch import Tensor
from triton.runtime.interpreter import GridExecutor


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

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
