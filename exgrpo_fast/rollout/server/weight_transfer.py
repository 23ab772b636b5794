"""Weights from the trainer to engines in other processes.

    SharedMemory   a safetensors file in memory that both map: the same machine
    Broadcast      a separate process group, gloo or NCCL: other GPUs, other machines

Both ends agree on a checksum of every tensor; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

NamedWeights = Iterable[tuple[str, Tensor]]
MEMORY = Path("/dev/shm")  # files here live in memory
END: dict[str, Any] = {}  # the label behind the last tensor of a broadcast


class BrokenTransfer(Exception):
    """What arrived is not what was sent."""


class Sender(Protocol):
    """The trainer's end."""

    def introduce(self, rank: int) -> dict[str, Any]:
        """The body of POST /join for server `rank`, from 1."""
        ...

    def send(
        self, weights: NamedWeights, announce: Callable[[dict[str, Any]], Callable[[], None]]
    ) -> None:
        """`announce` posts /update to all servers; what it returns waits for their answers."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """A server's end."""

    def receive(self, announced: Mapping[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        """The weights in order. BrokenTransfer at the first that differs from what was sent."""
        ...

    def close(self) -> None: ...


def checksum(tensor: Tensor) -> int:
    """Sum of the bits of a tensor, read as integers; the same on every device."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(words[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


# --- one machine ----------------------------------------------------------------------------------


class SharedMemorySender:
    """Writes a file that the servers map; it is deleted as soon as they have read it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        base = MEMORY if os.access(MEMORY, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="exgrpo-fast-", dir=base))  # mode 0700

    def introduce(self, rank: int) -> dict[str, Any]:
        return {"channel": "shared_memory", "folder": str(self.folder)}

    def send(
        self, weights: NamedWeights, announce: Callable[[dict[str, Any]], Callable[[], None]]
    ) -> None:
        # Cloned where nothing else copies: safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
            for name, tensor in weights
        }
        sums = {name: str(checksum(tensor)) for name, tensor in tensors.items()}
        file = self.folder / "weights.safetensors"
        save_file(tensors, file, metadata=sums)
        try:
            announce({"names": list(tensors)})()
        finally:
            file.unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class SharedMemoryReceiver:
    def __init__(self, introduction: Mapping[str, Any]) -> None:
        self.folder = Path(introduction["folder"])

    def receive(self, announced: Mapping[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        with safe_open(self.folder / "weights.safetensors", framework="pt") as file:
            sums = file.metadata()
            for name in announced["names"]:
                tensor = file.get_tensor(name)
                compare(name, tensor, int(sums[name]))
                yield name, tensor

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# --- other GPUs or machines -----------------------------------------------------------------------


class BroadcastSender:
    """Rank 0 of a process group that belongs to the weights alone.

    vLLM and the trainer each have a default group, so this one is made without them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        device: torch.device,
        num_servers: int,
        host: str = "127.0.0.1",
        timeout_seconds: float = 120.0,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.host, self.world_size = host, num_servers + 1
        self.timeout = timedelta(seconds=timeout_seconds)
        self.store = dist.TCPStore(
            host, 0, self.world_size, is_master=True, timeout=self.timeout, wait_for_workers=False
        )
        self.group: Any = None

    def introduce(self, rank: int) -> dict[str, Any]:
        return {
            "channel": "broadcast",
            "host": self.host,
            "port": self.store.port,
            "rank": rank,
            "world_size": self.world_size,
            "timeout_seconds": self.timeout.total_seconds(),
        }

    def send(
        self, weights: NamedWeights, announce: Callable[[dict[str, Any]], Callable[[], None]]
    ) -> None:
        """One tensor after the other: at most one sharded weight is gathered at a time."""
        answers = announce({"dtype": str(self.dtype).removeprefix("torch.")})
        if self.group is None:  # created once the servers, which have the address, join
            self.group = make_group(self.store, 0, self.world_size, self.device, self.timeout)
        for name, weight in weights:
            tensor = weight.detach().to(self.device, self.dtype).contiguous()
            label = {"name": name, "shape": list(tensor.shape), "checksum": checksum(tensor)}
            send_label(self.group, label, self.device)
            broadcast(self.group, tensor)
            del weight, tensor  # before the next one is gathered
        send_label(self.group, END, self.device)
        answers()

    def close(self) -> None:
        self.group = None


class BroadcastReceiver:
    def __init__(self, introduction: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = introduction["rank"], introduction["world_size"]
        self.timeout = timedelta(seconds=introduction["timeout_seconds"])
        self.store = dist.TCPStore(
            introduction["host"],
            introduction["port"],
            self.world_size,
            is_master=False,
            timeout=self.timeout,
        )
        self.group: Any = None

    def receive(self, announced: Mapping[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        if self.group is None:
            self.group = make_group(
                self.store, self.rank, self.world_size, self.device, self.timeout
            )
        dtype = getattr(torch, announced["dtype"])
        labelled = self._labelled(dtype)
        try:
            for label, tensor in labelled:
                compare(label["name"], tensor, label["checksum"])
                yield label["name"], tensor
        finally:
            for _ in labelled:  # the trainer and the other servers wait for this one
                pass

    def _labelled(self, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], Tensor]]:
        while (label := receive_label(self.group, self.device)) != END:
            tensor = torch.empty(label["shape"], dtype=dtype, device=self.device)
            broadcast(self.group, tensor)
            yield label, tensor

    def close(self) -> None:
        self.group = None


def make_receiver(
    introduction: Mapping[str, Any], device: torch.device
) -> SharedMemoryReceiver | BroadcastReceiver:
    if introduction["channel"] == "shared_memory":
        return SharedMemoryReceiver(introduction)
    return BroadcastReceiver(introduction, device)


def make_group(store: Any, rank: int, size: int, device: torch.device, timeout: timedelta) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def broadcast(group: Any, tensor: Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def send_label(group: Any, label: Mapping[str, Any], device: torch.device) -> None:
    content = torch.frombuffer(bytearray(json.dumps(label).encode()), dtype=torch.uint8)
    broadcast(group, torch.tensor([len(content)], device=device))
    broadcast(group, content.to(device))


def receive_label(group: Any, device: torch.device) -> dict[str, Any]:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    broadcast(group, size)
    content = torch.empty(int(size), dtype=torch.uint8, device=device)
    broadcast(group, content)
    return json.loads(bytes(content.tolist()))


def compare(name: str, tensor: Tensor, expected: int) -> None:
    if checksum(tensor) != expected:
        raise BrokenTransfer(f"{name} arrived changed")
