"""The ranks of one run and their collectives.

Every rank runs the same trainer with the same seeds on the same batch; the weights are sharded over
them. What only one can do (generate, score, write files) rank 0 does, and broadcasts the result as
JSON in a tensor of bytes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from exgrpo_fast.core.torchrun import SINGLE, RankInfo

T = TypeVar("T")

# A collective that waits longer than this ends its process. It has to outlast a whole rollout, for
# which all but the first process wait.
DEADLINE_SECONDS = 1800.0
BESIDE_SECONDS = 7200.0  # the same, of what is done beside training: a checkpoint that is written
GLOO_SECONDS = 0.2  # its threads have this long to let go at the end


class MainRankFailed(Exception):
    """Rank 0 failed in what it does for all ranks; it reports the cause itself."""


class RankLost(Exception):
    """Another rank died, or did not join a collective before the deadline."""


class RanksDiverged(Exception):
    """The ranks no longer agree; the message is one line."""


class Processes:
    """All ranks of a run; with a world size of 1 no method communicates."""

    def __init__(
        self,
        place: RankInfo = SINGLE,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`group`: the process group of the collectives; None: the default one."""
        self.place = place
        self.device = torch.device(device)
        self.group = group

    def background_group(self) -> Processes:
        """The same ranks with a gloo group of their own, for collectives on the host from another
        thread. A collective: all ranks call it."""
        if self.count == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=BESIDE_SECONDS))
        assert isinstance(group, dist.ProcessGroup)
        return Processes(self.place, "cpu", group)

    @property
    def count(self) -> int:
        return self.place.count

    @property
    def is_main(self) -> bool:
        return self.place.is_main

    # --- from rank 0 to all -----------------------------------------------------------------

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, plain JSON, on all ranks."""
        if self.count == 1:
            return value
        if self.is_main:
            content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            size = torch.tensor([len(content)])
            dist.broadcast(size, 0, self.group)
        else:
            size = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(size, 0, self.group)
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, self.group)
        return json.loads(content.numpy().tobytes())

    def run_on_rank0(
        self,
        make: Callable[[], Any],
        *,
        pack: Callable[[Any], Any] = lambda value: value,
        unpack: Callable[[Any], Any] = lambda value: value,
    ) -> Any:
        """What `make` returns on rank 0, the only rank that calls it.

        Its error is raised there, and MainRankFailed on the others. `pack` makes plain JSON of it.
        """
        if self.count == 1:
            return make()
        if not self.is_main:
            outcome = self.broadcast(None)
            if not outcome["made"]:
                raise MainRankFailed
            return unpack(outcome["value"])
        try:
            value = make()
            outcome = {"made": True, "value": pack(value)}
        except BaseException:
            self.broadcast({"made": False})
            raise
        self.broadcast(outcome)
        return value

    def one_rank_at_a_time(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank. The ranks of a machine call it one after the other, so
        that its temporary memory is needed once; `make` must not use collectives."""
        made = None
        for turn in range(int(self.all_reduce_max(self.place.local)) + 1):
            if turn == self.place.local:
                made = [make()]
            self.all_reduce_max(turn)
        assert made is not None
        return made[0]

    # --- from all to all --------------------------------------------------------------------

    def all_reduce_sum_(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; `values` on the device or the CPU."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_max(self, value: float) -> float:
        if self.count == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return float(found)

    def any(self, value: bool) -> bool:
        return bool(self.all_reduce_max(float(value)))

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, plain JSON, by rank."""
        if self.count == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = int(self.all_reduce_max(len(content)))
        sent = torch.full((longest,), ord(" "), dtype=torch.uint8)
        sent[: len(content)] = content
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent, self.group)
        return [json.loads(part.numpy().tobytes()) for part in received]

    def require_same(self, what: str, figures: Mapping[str, Any]) -> None:
        """RanksDiverged where a figure, a number or a text, differs between ranks."""
        found = self.gather(dict(figures))
        for name in figures:
            values = [part[name] for part in found]
            if any_differs(values):
                raise RanksDiverged(
                    f"{what}: the processes differ in {name}: {', '.join(map(str, values))}; "
                    f"the last checkpoint can be resumed"
                )


SINGLE_PROCESS = Processes()
LOST = ("gloo", "Gloo", "NCCL", "onnection", "Broken pipe")  # in the errors of a collective


def any_differs(values: Sequence[Any]) -> bool:
    """Compared as JSON, so that NaN equals itself."""
    return len({json.dumps(value) for value in values}) > 1


@contextlib.contextmanager
def joined(
    place: RankInfo, device: str, *, deadline: float | None = None, store: str = "env://"
) -> Iterator[Processes]:
    """Join the process group; destroy it at the end. `store`: an init_method of torch.distributed.

    RankLost where a collective of the block fails. Tensors on the CPU travel by gloo, those on GPUs by NCCL.
    """
    if place.count == 1:
        yield SINGLE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(place.local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=store,
        rank=place.rank,
        world_size=place.count,
        timeout=timedelta(seconds=deadline or DEADLINE_SECONDS),
    )
    try:
        yield Processes(place, device)
    except RuntimeError as error:
        if any(word in str(error) for word in LOST):
            raise RankLost(str(error).splitlines()[0]) from error
        raise
    finally:
        dist.destroy_process_group()
        # A thread of gloo's that still holds a tensor of the last collective needs the interpreter
        # to drop it, and aborts the process where that is being torn down (pytorch/pytorch#179291).
        time.sleep(GLOO_SECONDS)


def mesh_of(processes: Processes) -> DeviceMesh:
    """A one-dimensional mesh of all ranks on their devices."""
    return init_device_mesh(processes.device.type, (processes.count,))


def host_mesh(processes: Processes) -> DeviceMesh | None:
    """The same mesh on the hosts' CPUs; None for a single process, which shards nothing."""
    return init_device_mesh("cpu", (processes.count,)) if processes.count > 1 else None
