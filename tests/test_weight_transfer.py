"""Weights on their way to rollout servers: what arrives, what is noticed, and how much is held."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from exgrpo_fast.rollout.weight_transfer import (
    BroadcastSender,
    BrokenTransfer,
    SharedMemorySender,
    make_receiver,
)

CPU = torch.device("cpu")
WEIGHTS = {
    "embedding": torch.randn(7, 3),
    "a.name.that.is.not.ascii.ä": torch.randn(3),
    "empty": torch.empty(0, 3),
    "turned": torch.randn(4, 5).T,
}


def make_sender(way: str, dtype: torch.dtype) -> Any:
    if way == "shared_memory":
        return SharedMemorySender(dtype)
    return BroadcastSender(dtype, device=CPU, num_servers=1, timeout_seconds=30)


class Server:
    """A receiver; each update is taken in a thread of its own."""

    def __init__(self, sender: Any) -> None:
        self.receiver = make_receiver(sender.introduce(1), CPU)
        self.taken: list[dict[str, Tensor]] = []
        self.error: Exception | None = None

    def announce(self, announced: dict[str, Any]) -> Callable[[], None]:
        def receive() -> None:
            self.taken.append({})
            try:
                for name, tensor in self.receiver.receive(announced):
                    self.taken[-1][name] = tensor.clone()
            except BrokenTransfer as error:
                self.error = error

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        return thread.join


@pytest.mark.parametrize("way", ["shared_memory", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_arrives_in_order_time_and_again(way: str, dtype: torch.dtype) -> None:
    sender = make_sender(way, dtype)
    server = Server(sender)
    for factor in (1.0, 2.0):
        sender.send(((n, factor * w) for n, w in WEIGHTS.items()), server.announce)
        assert list(server.taken[-1]) == list(WEIGHTS)
        for name, weight in WEIGHTS.items():
            assert torch.equal(server.taken[-1][name], (factor * weight).to(dtype)), name
    server.receiver.close()
    sender.close()


@pytest.mark.parametrize("way", ["shared_memory", "broadcast"])
def test_a_changed_bit_is_named_and_keeps_nobody_waiting(way: str, monkeypatch) -> None:
    sender = make_sender(way, torch.float32)
    server = Server(sender)
    sums = itertools.count()  # no two are equal
    with monkeypatch.context() as patched:
        name = "exgrpo_fast.rollout.weight_transfer.checksum"
        patched.setattr(name, lambda tensor: next(sums))
        sender.send(WEIGHTS.items(), server.announce)
    assert str(server.error) == "embedding arrived changed"
    sender.send(WEIGHTS.items(), server.announce)
    assert list(server.taken[-1]) == list(WEIGHTS), "the next update is taken as ever"
    server.receiver.close()
    sender.close()


def test_a_broadcast_holds_one_weight_at_a_time() -> None:
    """Of a policy in parts each is put together on its way, and there is no room for all."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def made() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(6):
            weight = torch.full((5,), float(number))
            alive.add(weight)
            gc.collect()
            most = max(most, len(alive))
            yield str(number), weight
            del weight

    sender = make_sender("broadcast", torch.float32)
    server = Server(sender)
    sender.send(made(), server.announce)
    assert [float(t[0]) for t in server.taken[0].values()] == [0, 1, 2, 3, 4, 5]
    assert most == 1
    server.receiver.close()
    sender.close()
