"""Several processes with a pretend GPU each: what NCCL would carry travels by gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.utils._pytree as pytree
from pretend_gpu.tensor import CUDA, PretendTensor, on_device, values_of
from torch import Tensor
from torch.distributed.tensor import DTensor

NAMESPACES = {"c10d", "_c10d_functional"}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A collective on the values behind the tensors, which it writes to where it is in place."""
    found = func(*pytree.tree_map(values_of, args), **pytree.tree_map(values_of, kwargs))
    return pytree.tree_map(on_device, found)


@contextlib.contextmanager
def by_gloo() -> Iterator[None]:
    """`init_process_group` without NCCL; a DTensor is where its shard is."""
    start = dist.init_process_group

    def init_process_group(backend: str, *args: Any, **kwargs: Any) -> None:
        start("gloo", *args, **kwargs)

    def device(tensor: DTensor) -> Any:
        is_pretended = isinstance(tensor._local_tensor, PretendTensor)
        return CUDA if is_pretended else Tensor.device.__get__(tensor)  # pyright: ignore

    with (
        mock.patch.object(dist, "init_process_group", init_process_group),
        mock.patch.object(DTensor, "device", property(device), create=True),
    ):
        yield
