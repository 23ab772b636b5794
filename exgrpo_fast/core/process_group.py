"""The ranks of one run and their collectives.

Every rank runs the same trainer with the same seeds on the same batch; the weights are sharded over
them. What only one can do (generate, score, write files) rank 0 does, and broadcasts the result as
JSON in a tensor of bytes.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.torchrun import SINGLE, RankInfo

T = TypeVar("T")

# A collective that waits longer than this ends its process. It has to outlast a whole rollout, for
# which all but the first process wait. Ranks that hang are found sooner (run/rank_watch.py).
COLLECTIVE_SECONDS = 1800.0
BESIDE_SECONDS = 7200.0  # the same, of what is done beside training: a checkpoint that is written
SECONDS_BETWEEN_ASKING = 0.05
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
        store: dist.Store | None = None,
    ) -> None:
        """`group`: the process group of the collectives; None: the default one. `store`: the one
        the ranks have met in."""
        self.place = place
        self.device = torch.device(device)
        self.group = group
        self.store = store

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
        else:
            content, size = None, torch.zeros(1, dtype=torch.int64)
        with HEARTBEAT.waiting():
            dist.broadcast(size, 0, self.group)
            if content is None:
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
            with HEARTBEAT.waiting():
                dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_max(self, value: float) -> float:
        if self.count == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        with HEARTBEAT.waiting():
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
        with HEARTBEAT.waiting():
            dist.all_gather(received, sent, self.group)
        return [json.loads(part.numpy().tobytes()) for part in received]

    def require_same(self, what: str, figures: Mapping[str, Any]) -> None:
        """RanksDiverged where a figure, a number or a text, differs between ranks."""
        found = self.gather(dict(figures))
        for name in figures:
            values = [part[name] for part in found]
            if len({json.dumps(value) for value in values}) > 1:  # as JSON: NaN equals itself
                raise RanksDiverged(
                    f"{what}: the processes differ in {name}: {', '.join(map(str, values))}; "
                    f"the last checkpoint can be resumed"
                )


SINGLE_PROCESS = Processes()
LOST = ("gloo", "Gloo", "NCCL", "onnection", "Broken pipe")  # in the errors of a collective


@contextlib.contextmanager
def joined(
    place: RankInfo, device: str, *, deadline: float = COLLECTIVE_SECONDS, store: str = "env://"
) -> Iterator[Processes]:
    """Join the process group; destroy it at the end. `store`: an init_method of torch.distributed.
    `deadline`: seconds that a collective may wait.

    RankLost where a collective of the block fails. Tensors on the CPU travel by gloo, those on GPUs by NCCL.
    """
    if place.count == 1:
        yield SINGLE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(place.local)
    patience = timedelta(seconds=deadline)
    shared, _, _ = next(dist.rendezvous(store, place.rank, place.count, timeout=patience))
    shared.set_timeout(patience)
    meeting = store_of_this_attempt(shared, place, deadline)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=meeting,
        rank=place.rank,
        world_size=place.count,
        timeout=patience,
    )
    try:
        yield Processes(place, device, store=meeting)
    except RuntimeError as error:
        if any(word in str(error) for word in LOST):
            raise RankLost(first_line(error)) from error
        raise
    finally:
        dist.destroy_process_group()
        # A thread of gloo's that still holds a tensor of the last collective needs the interpreter
        # to drop it, and aborts the process where that is being torn down (pytorch/pytorch#179291).
        time.sleep(GLOO_SECONDS)


def store_of_this_attempt(store: dist.Store, place: RankInfo, deadline: float) -> dist.Store:
    """`store` under a prefix that is new and the same on all ranks. All ranks call it.

    torchrun keeps one store when it restarts the ranks, and the addresses of those before still lie
    there: a rank that joins sooner than another would connect to a process that is gone. So rank 0
    makes up a name for this attempt, and tells each rank under a key that this rank has made up.
    RankLost where a rank has not asked before the deadline, in seconds.
    """
    if not place.is_main:
        own = uuid.uuid4().hex
        store.set(f"asks/{place.rank}", own)
        attempt = store.get(f"answer/{own}").decode()
        store.set(f"{attempt}/knows/{place.rank}", "")
        return dist.PrefixStore(attempt, store)
    attempt, end = uuid.uuid4().hex, time.monotonic() + deadline
    missing = set(range(1, place.count))
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks/{rank}"]):  # perhaps a rank of an earlier attempt
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", attempt)
            if store.check([f"{attempt}/knows/{rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > end:
            raise RankLost(f"ranks {sorted(missing)} have not joined after {deadline:.0f} s")
        time.sleep(SECONDS_BETWEEN_ASKING)
    return dist.PrefixStore(attempt, store)


def mesh_of(processes: Processes) -> DeviceMesh:
    """A one-dimensional mesh of all ranks on their devices."""
    return init_device_mesh(processes.device.type, (processes.count,))


def host_mesh(processes: Processes) -> DeviceMesh | None:
    """The same mesh on the hosts' CPUs; None for a single process, which shards nothing."""
    return init_device_mesh("cpu", (processes.count,)) if processes.count > 1 else None
