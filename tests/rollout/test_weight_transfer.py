"""Weights from one process to others, without an engine: here the other end is a thread."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from exgrpo_fast.rollout.wire import (
    pack_completion,
    pack_requests,
    unpack_completion,
    unpack_requests,
)

CPU = torch.device("cpu")
NOTHING = torch.zeros(0)


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
        self.receivers = [make_receiver(sender.introduce(), CPU) for _ in range(count)]
        self.received: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        self.errors: list[Exception] = []
        self.members = list(range(count))  # those of the next transfer

    def announce(self, announced: Sequence[dict[str, Any]]) -> Callable[[], None]:
        threads = [
            threading.Thread(target=self._receive, args=(i, each))
            for i, each in zip(self.members, announced, strict=True)
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


def make_sender(channel: str, dtype: torch.dtype = torch.float32) -> Sender:
    if channel == "shared_memory":
        return SharedMemorySender(dtype)
    return BroadcastSender(dtype, device=CPU, timeout_seconds=20.0)


@pytest.mark.parametrize("channel", ["shared_memory", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_servers_get_all_weights_again_and_again(channel, dtype) -> None:
    sender = make_sender(channel, dtype)
    servers = Servers(sender, 2)
    for _ in range(3):
        sent = weights()
        sender.send(sent, servers.announce, servers.members)
        assert servers.errors == []
        for received in servers.received:
            assert list(received) == [name for name, _ in sent]
            for name, tensor in sent:
                assert torch.equal(received[name], tensor.to(dtype)), name
    sender.close()


def test_the_file_in_memory_does_not_outlive_the_update() -> None:
    sender = SharedMemorySender(torch.float32)
    seen: list[list[str]] = []

    def announce(announced: Sequence[dict[str, Any]]) -> Callable[[], None]:
        seen.append([path.name for path in sender.folder.iterdir()])
        return lambda: None

    sender.send(weights(), announce, ["one"])
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
    sender.send(weights(), servers.announce, servers.members)
    (error,) = servers.errors
    assert isinstance(error, BrokenTransfer) and "norm arrived changed" in str(error)
    monkeypatch.undo()
    sender.send(weights(), servers.announce, servers.members)
    assert servers.errors == [error], "nobody was kept waiting: the next update is taken as ever"
    sender.close()


def test_the_receivers_of_a_broadcast_may_change() -> None:
    sender = make_sender("broadcast")
    servers = Servers(sender, 3)
    for members in ([0, 1, 2], [1], [0, 2], [0, 1, 2]):
        servers.members, sent = members, weights()
        sender.send(sent, servers.announce, members)
        for number in range(3):
            same = [torch.equal(servers.received[number].get(n, NOTHING), w) for n, w in sent]
            assert same == [number in members] * len(sent), (members, number)
    assert isinstance(sender, BroadcastSender)
    assert servers.errors == [] and sender.num_groups == 4
    sender.close()


def test_a_broadcast_that_loses_a_receiver_leaves_the_others_as_they_were() -> None:
    """It breaks off for all; the next one, without the lost one, is whole."""
    sender = make_sender("broadcast")
    servers = Servers(sender, 2)
    lost: Any = servers.receivers[1]

    def hang_up(dtype: torch.dtype) -> Iterator[Any]:
        lost.group = None
        gc.collect()
        yield from ()

    lost._labelled = hang_up
    big = [("big", torch.randn(1 << 20)), *weights()]
    with pytest.raises(BrokenTransfer, match="the broadcast of weights broke off"):
        sender.send(big, servers.announce, servers.members)
    while not servers.errors:
        time.sleep(0.01)
    assert isinstance(servers.errors[0], BrokenTransfer) and servers.received[0] == {}
    servers.members, sent = [0], weights()
    sender.send(sent, servers.announce, servers.members)
    assert all(torch.equal(servers.received[0][name], tensor) for name, tensor in sent)
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
    sender.send(made(), servers.announce, servers.members)
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
