"""What the ranks of a sharded model agree on before each collective of a pass.

A rank whose memory runs out is between two collectives, and the others wait for it inside the next
one, where nothing reaches them. So before each collective all ranks exchange a number: there a rank
says that it has failed, all leave the pass at the same place, and no collective is under way.

    rank 0    check  gather  check  gather  check          -> PeerOutOfMemory
    rank 1    check  gather  check  gather  out of memory,
                                            check(OUT_OF_MEMORY)

The exchange is a gloo all-reduce of 8 bytes on the host: it waits for the other hosts, and for no
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)

from exgrpo_fast.core.process_group import Processes
from exgrpo_kernels import NonFiniteHidden

T = TypeVar("T")
FINE, NOT_FINITE, OUT_OF_MEMORY = range(3)  # the greatest of all ranks counts


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Memory ran out on another rank; this one has left the same pass."""


class PassCheck:
    """Called by all ranks equally often; raises on all where one has a problem."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __call__(self, problem: int = FINE) -> None:
        """PeerOutOfMemory or NonFiniteHidden."""
        found = self.processes.all_reduce_max(problem)
        if found == OUT_OF_MEMORY:
            raise PeerOutOfMemory("out of memory on another rank")
        if found == NOT_FINITE:
            raise NonFiniteHidden("hidden must be finite in every process")

    def all_or_none(self, passes: Callable[[], T]) -> T:
        """What `passes` returns, on all ranks; torch.OutOfMemoryError on all where one has run out.

        A rank that has run out joins the check that the others come to next; the last one is here.
        """
        try:
            found = passes()
            self()
            return found
        except PeerOutOfMemory:
            raise
        except torch.OutOfMemoryError as error:
            with contextlib.suppress(PeerOutOfMemory):
                self(OUT_OF_MEMORY)
            raise error

    def guard(self, module: FSDPModule) -> None:
        """Check before each collective of FSDP2 on the parameters of `module`."""
        module.set_custom_all_gather(_CheckedAllGather(self))
        module.set_custom_reduce_scatter(_CheckedReduceScatter(self))


class _Checked:
    """`allocate` comes before, so that memory does not run out between check and collective."""

    def __init__(self, check: PassCheck) -> None:
        self.check = check

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        self.check()
        collective: Any = super()
        return collective.__call__(*tensors, **options)


class _CheckedAllGather(_Checked, DefaultAllGather):
    pass


class _CheckedReduceScatter(_Checked, DefaultReduceScatter):
    pass
