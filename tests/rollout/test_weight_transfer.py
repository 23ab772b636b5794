"""Weights from one process to others, without an engine: here the other end is a thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from exgrpo_fast.core.types import Completion, WeightSpan
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.server.weight_transfer import (
    BroadcastSender,
    BrokenTransfer,
    Sender,
    SharedMemorySender,
    checksum,
    make_receiver,
)
from exgrpo_fast.rollout.server.wire import (
    pack_completion,
    pack_requests,
    unpack_completion,
    unpack_requests,
)

CPU = torch.device("cpu")


def weights() -> list[tuple[str, torch.Tensor]]:
    tied = torch.randn(7, 3)
    return [
        ("embed", tied),
        ("norm", torch.randn(3)),
        ("turned", torch.randn(4, 5).T),
        ("head", tied),
    ]


class Servers:
    """The receiving ends; each takes an update in a thread of its own."""

    def __init__(self, sender: Sender, count: int) -> None:
        self.receivers = [make_receiver(sender.introduce(r + 1), CPU) for r in range(count)]
        self.received: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        self.errors: list[Exception] = []

    def announce(self, announced: dict[str, Any]) -> Callable[[], None]:
        threads = [
            threading.Thread(target=self._receive, args=(i, announced))
            for i in range(len(self.receivers))
        ]
        for thread in threads:
            thread.start()

        def wait() -> None:
            for thread in threads:
                thread.join(30)

        return wait

    def _receive(self, number: int, announced: dict[str, Any]) -> None:
        try:
            for name, tensor in self.receivers[number].receive(announced):
                self.received[number][name] = tensor.clone()
        except Exception as error:
            self.errors.append(error)


def make_sender(channel: str, dtype: torch.dtype = torch.float32, num_servers: int = 1) -> Sender:
    if channel == "shared_memory":
        return SharedMemorySender(dtype)
    return BroadcastSender(dtype, device=CPU, num_servers=num_servers)


@pytest.mark.parametrize("channel", ["shared_memory", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_servers_get_all_weights_again_and_again(channel, dtype) -> None:
    sender = make_sender(channel, dtype, num_servers=2)
    servers = Servers(sender, 2)
    for _ in range(3):
        sent = weights()
        sender.send(sent, servers.announce)
        assert servers.errors == []
        for received in servers.received:
            assert list(received) == [name for name, _ in sent]
            for name, tensor in sent:
                assert torch.equal(received[name], tensor.to(dtype)), name
    sender.close()


def test_the_file_in_memory_does_not_outlive_the_update() -> None:
    sender = SharedMemorySender(torch.float32)
    seen: list[list[str]] = []

    def announce(announced: dict[str, Any]) -> Callable[[], None]:
        seen.append([path.name for path in sender.folder.iterdir()])
        return lambda: None

    sender.send(weights(), announce)
    assert seen == [["weights.safetensors"]]
    assert list(sender.folder.iterdir()) == []
    assert sender.folder.stat().st_mode & 0o077 == 0
    sender.close()
    assert not sender.folder.exists()


@pytest.mark.parametrize("channel", ["shared_memory", "broadcast"])
def test_a_bit_that_changes_on_the_way_is_found(channel, monkeypatch) -> None:
    import exgrpo_fast.rollout.server.weight_transfer as module

    sender = make_sender(channel)
    servers = Servers(sender, 1)
    real, calls = module.checksum, []

    def lying(tensor: torch.Tensor) -> int:  # the sender's view of the second tensor
        if threading.current_thread() is not threading.main_thread():
            return real(tensor)
        calls.append(tensor)
        return real(tensor) + (len(calls) == 2)

    monkeypatch.setattr(module, "checksum", lying)
    sender.send(weights(), servers.announce)
    (error,) = servers.errors
    assert isinstance(error, BrokenTransfer) and "norm arrived changed" in str(error)
    monkeypatch.undo()
    sender.send(weights(), servers.announce)
    assert servers.errors == [error], "nobody was kept waiting: the next update is taken as ever"
    sender.close()


def test_a_broadcast_holds_one_weight_at_a_time() -> None:
    """Of a policy in parts each is put together on its way, and there is no room for all."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(6):
            weight = torch.full((5,), float(number))
            alive.add(weight)
            gc.collect()
            most = max(most, len(alive))
            yield str(number), weight
            del weight

    sender = make_sender("broadcast")
    servers = Servers(sender, 1)
    sender.send(made(), servers.announce)
    assert [float(t[0]) for t in servers.received[0].values()] == [0, 1, 2, 3, 4, 5]
    assert most == 1
    sender.close()


def test_a_checksum_sees_every_bit_and_no_layout() -> None:
    x = torch.randn(6, 4)
    assert checksum(x) == checksum(x.T.contiguous().T)
    bits = x.view(torch.int32).clone()
    bits[3, 2] ^= 1
    assert checksum(bits.view(torch.float32)) != checksum(x)
    assert checksum(x.bfloat16()) == checksum(x.bfloat16().clone())


def test_requests_and_completions_survive_the_wire() -> None:
    import json

    requests = [Request((1, 2, 3), 2**64 - 1), Request((4,), 5, max_completion_tokens=7)]
    sampling = Sampling(16, 0.7, 0.9)
    body = json.loads(json.dumps(pack_requests(requests, sampling)))
    assert unpack_requests(body) == (requests, sampling)
    sent = Completion(
        torch.tensor([3, 70000, 1]),
        torch.tensor([-0.1, -20.5, -1e-7]),
        True,
        (WeightSpan(4, 0, 3),),
    )
    place, got = unpack_completion(json.loads(json.dumps(pack_completion(9, sent))))
    assert place == 9 and got.truncated and got.weight_spans == sent.weight_spans
    assert torch.equal(got.token_ids, sent.token_ids) and torch.equal(got.logprobs, sent.logprobs)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"requests": [{"prompt_ids": ["x"], "seed": 1}], "sampling": {"max_completion_tokens": 1}},
        {"requests": [{"prompt_ids": [1], "seed": 1, "top_k": 3}], "sampling": {}},
        {"requests": 3, "sampling": {"max_completion_tokens": 1}},
    ],
)
def test_what_is_no_request_is_refused(body) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        unpack_requests(body)
