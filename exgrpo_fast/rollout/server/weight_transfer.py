"""Weights from the trainer to engines in other processes.

    SharedMemory   a safetensors file in memory that both map: the same machine
    Broadcast      a separate process group, gloo or NCCL: other GPUs, other machines

Both ends agree on a checksum of every tensor; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from exgrpo_fast.core.text import first_line

NamedWeights = Iterable[tuple[str, Tensor]]
MEMORY = Path("/dev/shm")  # files here live in memory
END: dict[str, Any] = {}  # the label behind the last tensor of a broadcast

# Posts /update to the receivers, to each what is announced to it; the result waits for their answers.
Announce = Callable[[Sequence[dict[str, Any]]], Callable[[], None]]


class BrokenTransfer(Exception):
    """What arrived is not what was sent, or an end of the transfer is gone."""


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

    def introduce(self) -> dict[str, Any]:
        """The body of POST /join."""
        return {"channel": "shared_memory", "folder": str(self.folder)}

    def send(
        self, weights: NamedWeights, announce: Announce, receivers: Sequence[Hashable]
    ) -> None:
        """To all `receivers`, which are any keys; BrokenTransfer where one of them is lost."""
        # Cloned where nothing else copies: safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().to("cpu", self.dtype, copy=True).contiguous()
            for name, tensor in weights
        }
        sums = {name: str(checksum(tensor)) for name, tensor in tensors.items()}
        file = self.folder / "weights.safetensors"
        save_file(tensors, file, metadata=sums)
        try:
            announce([{"names": list(tensors)} for _ in receivers])()
        finally:
            file.unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class SharedMemoryReceiver:
    """A server's end."""

    def __init__(self, introduction: Mapping[str, Any]) -> None:
        self.folder = Path(introduction["folder"])

    def receive(self, announced: Mapping[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        """The weights in order, all of them compared with their checksums before this returns.

        BrokenTransfer where one differs from what was sent, or the transfer broke off.
        """
        file = safe_open(self.folder / "weights.safetensors", framework="pt")
        sums = file.metadata()
        for name in announced["names"]:
            compare(name, file.get_tensor(name), int(sums[name]))
        return ((name, file.get_tensor(name)) for name in announced["names"])

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# --- other GPUs or machines -----------------------------------------------------------------------


class BroadcastSender:
    """Rank 0 of a process group that belongs to the weights alone.

    vLLM and the trainer each have a default group, so this one is made without them. It holds the
    receivers of one transfer; where others come next, or one of them was lost, the next transfer
    makes a new one through the same store.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        device: torch.device,
        host: str = "127.0.0.1",
        timeout_seconds: float = 120.0,
    ) -> None:
        """`host`: the address to listen on, by which the receivers reach this process."""
        self.dtype, self.device, self.host = dtype, device, host
        self.timeout = timedelta(seconds=timeout_seconds)
        # Torch would listen on every interface; the descriptor is its own from here on.
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self.store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.group: Any = None
        self.receivers: list[Hashable] = []
        self.num_groups = 0

    def introduce(self) -> dict[str, Any]:
        return {
            "channel": "broadcast",
            "host": self.host,
            "port": self.store.port,
            "timeout_seconds": self.timeout.total_seconds(),
        }

    def send(
        self, weights: NamedWeights, announce: Announce, receivers: Sequence[Hashable]
    ) -> None:
        """One tensor after the other: at most one sharded weight is gathered at a time."""
        is_new = self.group is None or self.receivers != list(receivers)
        self.num_groups += is_new
        size = len(receivers) + 1
        dtype = str(self.dtype).removeprefix("torch.")
        shared = {"dtype": dtype, "group": self.num_groups, "world_size": size}
        answers = announce([{**shared, "rank": rank} for rank in range(1, size)])
        if is_new:  # created once the receivers, which know its number, join
            self.receivers = list(receivers)
            self.group = None
            with transfers(self):
                self.group = make_group(self, self.num_groups, 0, size)
        for name, weight in weights:
            tensor = weight.detach().to(self.device, self.dtype).contiguous()
            label = {"name": name, "shape": list(tensor.shape), "checksum": checksum(tensor)}
            with transfers(self):
                send_label(self.group, label, self.device)
                broadcast(self.group, tensor)
            del weight, tensor  # before the next one is gathered
        with transfers(self):
            send_label(self.group, END, self.device)
        answers()

    def close(self) -> None:
        self.group = None


class BroadcastReceiver:
    """Receives all weights into host memory first: a transfer that breaks off leaves the model as it
    was."""

    def __init__(self, introduction: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.timeout = timedelta(seconds=introduction["timeout_seconds"])
        host, port = introduction["host"], introduction["port"]
        self.store = dist.TCPStore(
            host, port, is_master=False, timeout=self.timeout, wait_for_workers=False
        )
        with socket.create_connection((host, port), self.timeout.total_seconds()) as there:
            self.host = there.getsockname()[0]  # the interface by which the trainer is reached
        self.group: Any = None
        self.number = 0

    def receive(self, announced: Mapping[str, Any]) -> Generator[tuple[str, Tensor], None, None]:
        with transfers(self):
            if self.group is None or self.number != announced["group"]:
                self.group, self.number = None, announced["group"]
                size = announced["world_size"]
                self.group = make_group(self, self.number, announced["rank"], size)
            received = list(self._labelled(getattr(torch, announced["dtype"])))
        for label, tensor in received:
            compare(label["name"], tensor, label["checksum"])
        return ((label["name"], tensor) for label, tensor in received)

    def _labelled(self, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], Tensor]]:
        while (label := receive_label(self.group, self.device)) != END:
            tensor = torch.empty(label["shape"], dtype=dtype, device=self.device)
            broadcast(self.group, tensor)
            yield label, tensor.cpu()

    def close(self) -> None:
        self.group = None


@contextlib.contextmanager
def transfers(end: BroadcastSender | BroadcastReceiver) -> Iterator[None]:
    """An error of the group inside is a BrokenTransfer, and the next transfer makes another group."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: a label that is no JSON
        if end.group is not None:
            end.group.abort()  # the other ends learn of it at once
        end.group = None
        raise BrokenTransfer(f"the broadcast of weights broke off: {first_line(error)}") from error


Sender = SharedMemorySender | BroadcastSender  # the trainer's end
Receiver = SharedMemoryReceiver | BroadcastReceiver  # a server's


def make_receiver(introduction: Mapping[str, Any], device: torch.device) -> Receiver:
    if introduction["channel"] == "shared_memory":
        return SharedMemoryReceiver(introduction)
    return BroadcastReceiver(introduction, device)


def make_group(end: BroadcastSender | BroadcastReceiver, number: int, rank: int, size: int) -> Any:
    """A collective of all `size` ranks, which agree on `number`. gloo listens on the end's host alone."""
    own = dist.PrefixStore(f"weights/{number}", end.store)
    if end.device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = end.timeout
        return dist.ProcessGroupNCCL(own, rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=end.host)]
    gloo._timeout = end.timeout
    return dist.ProcessGroupGloo(own, rank, size, gloo)


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
