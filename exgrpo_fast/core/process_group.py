"""The processes of one run, and what they tell each other.

Every process runs the same trainer with the same seeds on the same batch; the weights are shared
out among them. What only one can do (generate, judge, write files) the first does, and tells the
others: as JSON in a tensor of bytes.
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

from exgrpo_fast.core.torchrun import ONLY, Place

T = TypeVar("T")

# A collective that waits longer than this ends its process. It has to outlast a whole rollout, for
# which all but the first process wait.
DEADLINE_SECONDS = 1800.0
BESIDE_SECONDS = 7200.0  # the same, of what is done beside training: a checkpoint that is written
GLOO_SECONDS = 0.2  # its threads have this long to let go at the end


class FirstFailed(Exception):
    """The first process has failed in what it does for all; it says why itself."""


class PeersLost(Exception):
    """Another process of the run has died, or has kept this one waiting beyond the deadline."""


class OutOfStep(Exception):
    """The processes no longer do the same, in one line."""


class Processes:
    """All processes of a run, or one alone, which talks to nobody."""

    def __init__(
        self,
        place: Place = ONLY,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """`group`: through which they talk; None for torch's default one."""
        self.place = place
        self.device = torch.device(device)
        self.group = group

    def beside(self) -> Processes:
        """The same processes with a way of their own to talk, on the host and from another thread.
        All of them have to ask."""
        if self.count == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=BESIDE_SECONDS))
        assert isinstance(group, dist.ProcessGroup)
        return Processes(self.place, "cpu", group)

    @property
    def count(self) -> int:
        return self.place.count

    @property
    def is_first(self) -> bool:
        return self.place.is_first

    # --- what the first one knows -------------------------------------------------------------

    def of_first(self, value: Any) -> Any:
        """The first process's value, plain JSON, on all of them."""
        if self.count == 1:
            return value
        if self.is_first:
            content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            size = torch.tensor([len(content)])
            dist.broadcast(size, 0, self.group)
        else:
            size = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(size, 0, self.group)
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0, self.group)
        return json.loads(content.numpy().tobytes())

    def from_first(
        self,
        make: Callable[[], Any],
        *,
        pack: Callable[[Any], Any] = lambda value: value,
        unpack: Callable[[Any], Any] = lambda value: value,
    ) -> Any:
        """What `make` returns in the first process; only there it is called.

        Its error is raised there, and FirstFailed in the others. `pack` makes plain JSON of it.
        """
        if self.count == 1:
            return make()
        if not self.is_first:
            told = self.of_first(None)
            if not told["made"]:
                raise FirstFailed
            return unpack(told["value"])
        try:
            value = make()
            told = {"made": True, "value": pack(value)}
        except BaseException:
            self.of_first({"made": False})
            raise
        self.of_first(told)
        return value

    def in_turns(self, make: Callable[[], T]) -> T:
        """What `make` returns here. On each machine one process after the other calls it, so that
        the memory it takes meanwhile is taken once; it must not talk to other processes."""
        made = None
        for turn in range(int(self.greatest(self.place.local)) + 1):
            if turn == self.place.local:
                made = [make()]
            self.greatest(turn)
        assert made is not None
        return made[0]

    # --- what all of them know ----------------------------------------------------------------

    def sum_(self, values: Tensor) -> Tensor:
        """Added up in place over all processes; on the device or the CPU."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def greatest(self, value: float) -> float:
        if self.count == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return float(found)

    def any(self, value: bool) -> bool:
        return bool(self.greatest(float(value)))

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, plain JSON, by rank."""
        if self.count == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = int(self.greatest(len(content)))
        sent = torch.full((longest,), ord(" "), dtype=torch.uint8)
        sent[: len(content)] = content
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent, self.group)
        return [json.loads(part.numpy().tobytes()) for part in received]

    def require_same(self, what: str, figures: Mapping[str, Any]) -> None:
        """OutOfStep where a figure, a number or a text, is not the same in all processes."""
        found = self.gather(dict(figures))
        for name in figures:
            values = [part[name] for part in found]
            if any_differs(values):
                raise OutOfStep(
                    f"{what}: the processes differ in {name}: {', '.join(map(str, values))}; "
                    f"the last checkpoint can be resumed"
                )


ALONE = Processes()
LOST = ("gloo", "Gloo", "NCCL", "onnection", "Broken pipe")  # in the errors of a collective


def any_differs(values: Sequence[Any]) -> bool:
    """Compared as JSON, so that NaN equals itself."""
    return len({json.dumps(value) for value in values}) > 1


@contextlib.contextmanager
def joined(
    place: Place, device: str, *, deadline: float | None = None, store: str = "env://"
) -> Iterator[Processes]:
    """Meet the other processes; leave them at the end. `store`: where, by torchrun's environment.

    PeersLost where a collective of the block fails. Tensors on the CPU travel by gloo, those on GPUs by NCCL.
    """
    if place.count == 1:
        yield ALONE
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
            raise PeersLost(str(error).splitlines()[0]) from error
        raise
    finally:
        dist.destroy_process_group()
        # A thread of gloo's that still holds a tensor of the last collective needs the interpreter
        # to drop it, and aborts the process where that is being torn down (pytorch/pytorch#179291).
        time.sleep(GLOO_SECONDS)


def mesh_of(processes: Processes) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(processes.device.type, (processes.count,))


def host_mesh(processes: Processes) -> DeviceMesh | None:
    """The same, of what lies on their hosts; None for one process, which has no parts."""
    return init_device_mesh("cpu", (processes.count,)) if processes.count > 1 else None
