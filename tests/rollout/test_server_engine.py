"""Several rollout servers, which die, stall, come back and forget: stand-ins that speak HTTP."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from http_server import Server as HttpServer
from http_server import running_server
from stand_in_server import StandIn, scripted

from exgrpo_fast.core.types import Completion
from exgrpo_fast.rollout.engine import EngineLost, EngineRefused, Observer, Request, Sampling
from exgrpo_fast.rollout.server.dispatch import Dispatch
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.server.fleet import Server
from exgrpo_fast.rollout.server.process import ServerConnection
from exgrpo_fast.rollout.server.weight_transfer import BroadcastSender, SharedMemorySender

REQUESTS = [Request((5, 6), seed=1000 + i) for i in range(20)]
SAMPLING = Sampling(8)


class Weights:
    """As much of a policy as a sender needs; `step` changes every weight."""

    def __init__(self) -> None:
        self.tensors = {"a": torch.randn(5, 3), "b": torch.randn(7)}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def step(self) -> None:
        self.tensors = {name: tensor + 1 for name, tensor in self.tensors.items()}


class World:
    """Stand-ins in threads, and an engine of theirs."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.policy = Weights()
        self.stand_ins = [StandIn(scripted) for _ in range(count)]
        self.http: list[HttpServer] = []
        for stand_in in self.stand_ins:
            server = stack.enter_context(running_server(monkeypatch))
            server.behave = stand_in
            self.http.append(server)
        self.stack = stack

    def engine(self, *, key: str = "key", channel: str = "shared_memory", **more: Any) -> Any:
        servers = [
            Server(ServerConnection(name=name, key=key, url=http.url.removesuffix("/v1")))
            for name, http in zip("AB", self.http, strict=False)
        ]
        if channel == "shared_memory":
            sender: Any = SharedMemorySender(torch.float32)
        else:
            sender = BroadcastSender(torch.float32, device=torch.device("cpu"), timeout_seconds=20)
        policy: Any = self.policy
        options: dict[str, Any] = {"deadline": 20.0, "retry_seconds": 0.05} | more
        self.stack.callback(sender.close)
        engine = ServerEngine(servers, policy, sender, **options)
        self.stack.callback(engine.close)
        return engine

    def assert_current(self, *stand_ins: StandIn) -> None:
        for stand_in in stand_ins:
            assert stand_in.weights.keys() == self.policy.tensors.keys()
            for name, tensor in self.policy.tensors.items():
                assert torch.equal(stand_in.weights[name], tensor), name


@pytest.fixture
def make_world(monkeypatch) -> Iterator[Callable[[int], World]]:
    with ExitStack() as stack:
        yield lambda count: World(stack, monkeypatch, count)


def assert_all_answered(completions: list[Completion]) -> None:
    assert [int(c.token_ids[0]) for c in completions] == [r.seed % 97 for r in REQUESTS]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class OnPoll(Observer):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act
        self.places: list[int] = []

    def finished(self, places: Any, completions: Any) -> None:
        self.places += places

    def on_poll(self) -> None:
        self.act()


# --- the plan -------------------------------------------------------------------------------------


def test_requests_go_to_whom_has_the_fewest_and_never_above_the_limit() -> None:
    dispatch: Dispatch[str] = Dispatch(10, limit=3)
    first, second = dispatch.assign(["A", "B"])
    assert (first.server, first.places, second.server, second.places) == (
        *("A", [0, 2, 4]),
        *("B", [1, 3, 5]),
    )
    assert dispatch.assign(["A", "B"]) == []
    assert dispatch.finish(second, 3) and not dispatch.finish(second, 3), "it counts once"
    (third,) = dispatch.assign(["A", "B"])
    assert (third.server, third.places) == ("B", [6])


def test_what_a_lost_post_has_not_finished_is_asked_again_before_the_rest() -> None:
    dispatch: Dispatch[str] = Dispatch(8, limit=3)
    first, _ = dispatch.assign(["A", "B"])
    dispatch.finish(first, 2)
    assert dispatch.end(first) == 2 == dispatch.num_returned
    assert list(dispatch.waiting) == [0, 4, 6, 7]
    assert dispatch.assign(["B"]) == [], "B has its three"


def test_a_server_is_not_posted_to_for_every_single_request() -> None:
    dispatch: Dispatch[str] = Dispatch(100, limit=16)
    (post,) = dispatch.assign(["A"])
    dispatch.finish(post, 0)
    assert dispatch.assign(["A"]) == []
    dispatch.finish(post, 1)
    assert [p.places for p in dispatch.assign(["A"])] == [[16, 17]]


# --- generation -----------------------------------------------------------------------------------


def test_the_slower_server_gets_fewer_requests(make_world) -> None:
    world = make_world(2)
    slow, quick = world.stand_ins
    may_go_on = threading.Event()

    def stalls(*asked: Any) -> Completion:
        may_go_on.wait(30)
        return scripted(*asked)

    slow.draw = stalls
    generation = world.engine(max_in_flight=3).start(REQUESTS, SAMPLING)
    until(lambda: len(quick.served) == len(REQUESTS) - 3)
    may_go_on.set()
    assert_all_answered(generation.wait())
    assert len(slow.served) == 3 and len(quick.served) == 17
    assert max(slow.most_in_flight, quick.most_in_flight) <= 3


@pytest.mark.parametrize("channel", ["shared_memory", "broadcast"])
def test_a_server_that_dies_is_left_out_and_comes_back_with_the_weights(
    make_world, channel: str
) -> None:
    world = make_world(2)
    stays, dies = world.stand_ins
    engine = world.engine(channel=channel, max_in_flight=4)
    assert engine.sync(1) == {"servers_live": 2, "requests_resent": 0}

    def drop_dead(*asked: Any) -> Completion:
        dies.is_dead = len(dies.served) == 2
        return scripted(*asked)

    dies.draw = drop_dead
    observer = OnPoll(lambda: None)
    assert_all_answered(engine.generate(REQUESTS, SAMPLING, observer))
    assert sorted(observer.places) == list(range(20)), "each is finished once"
    assert len(dies.served) == 2, "and the client may have read none of them"
    assert sorted({*stays.served, *dies.served}) == [r.seed for r in REQUESTS]
    assert len(set(stays.served)) == len(stays.served) >= 18
    world.policy.step()
    figures = engine.sync(2)
    assert figures["servers_live"] == 1 and 2 <= figures["requests_resent"] <= 6
    world.assert_current(stays)
    dies.start()
    dies.draw = scripted

    def after_the_other(*asked: Any) -> Completion:
        until(lambda: bool(dies.served))
        return scripted(*asked)

    stays.draw = after_the_other  # it takes part without waiting for the next sync
    assert_all_answered(engine.generate(REQUESTS, SAMPLING))
    world.assert_current(stays, dies)
    assert dies.version == 2
    assert engine.sync(3) == {"servers_live": 2, "requests_resent": 0}


@pytest.mark.parametrize("channel", ["shared_memory", "broadcast"])
def test_a_server_that_dies_in_an_update_does_not_take_the_others_along(
    make_world, channel: str
) -> None:
    world = make_world(2)
    stays, dies = world.stand_ins
    engine = world.engine(channel=channel)
    engine.sync(1)

    def die(body: Any) -> Any:
        dies.is_dead, dies.receiver = True, None
        gc.collect()  # of the group, whose sockets close
        raise ValueError("gone")

    dies.update = die
    world.policy.step()
    assert engine.sync(2)["servers_live"] == 1
    world.assert_current(stays)
    assert_all_answered(engine.generate(REQUESTS, SAMPLING))


def test_a_generation_outlives_the_loss_of_all_servers(make_world) -> None:
    world = make_world(1)
    (only,) = world.stand_ins
    engine = world.engine(max_in_flight=4)
    engine.sync(4)

    def drop_dead(*asked: Any) -> Completion:
        only.is_dead = len(only.served) == 5
        return scripted(*asked)

    only.draw = drop_dead

    def start_again() -> None:
        if only.is_dead and not engine.fleet.live:
            only.start()
            only.draw = scripted

    assert_all_answered(engine.generate(REQUESTS, SAMPLING, OnPoll(start_again)))
    world.assert_current(only)
    assert only.version == 4 and 15 <= len(set(only.served)) <= 20


def test_without_any_server_it_ends_in_one_line_after_a_while(make_world) -> None:
    world = make_world(2)
    engine = world.engine(patience=0.2)
    for stand_in in world.stand_ins:
        stand_in.is_dead = True
    with pytest.raises(
        EngineLost, match=r"no rollout server came back within 0\.2 s .* [AB] is lo"
    ):
        engine.generate(REQUESTS, SAMPLING)
    with pytest.raises(EngineLost, match="no rollout server came back") as ended:
        engine.sync(1)
    assert "\n" not in str(ended.value)


def test_completions_of_older_weights_are_generated_again(make_world) -> None:
    """A server that was started again behind the trainer's back has the weights of its folder."""
    world = make_world(2)
    forgetful, other = world.stand_ins
    engine = world.engine(max_in_flight=4)
    engine.sync(5)
    forgetful.start()
    completions = engine.generate(REQUESTS, SAMPLING)
    assert_all_answered(completions)
    assert {span.version for c in completions for span in c.weight_spans} == {5}
    until(lambda: engine.sync(6)["servers_live"] == 2)
    world.assert_current(forgetful, other)


def test_a_server_that_gets_other_weights_is_left_out(make_world) -> None:
    world = make_world(2)
    bad, good = world.stand_ins
    bad.broken_updates = 2
    engine = world.engine(retry_seconds=30.0)
    assert engine.sync(1)["servers_live"] == 1
    assert_all_answered(engine.generate(REQUESTS, SAMPLING))
    assert bad.served == [] and bad.version == 0
    world.assert_current(good)


def test_requests_that_are_refused_end_the_generation(make_world) -> None:
    world = make_world(2)
    engine = world.engine()
    world.stand_ins[0].refusals = 1
    with pytest.raises(EngineRefused, match="engine A refuses /generate: it does not fit"):
        engine.generate(REQUESTS, SAMPLING)
    assert len(engine.fleet.live) == 2


# --- the start ------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_yet_joins_later(make_world) -> None:
    world = make_world(2)
    late, early = world.stand_ins
    late.is_dead = True
    engine = world.engine()
    assert engine.sync(1)["servers_live"] == 1
    late.start()
    until(lambda: engine.sync(2)["servers_live"] == 2)
    world.assert_current(early, late)


def test_a_wrong_key_or_no_server_at_all_ends_at_once(make_world) -> None:
    world = make_world(2)
    with pytest.raises(EngineRefused, match="engine A refuses /join: the key is missing or wrong"):
        world.engine(key="other")
    for stand_in in world.stand_ins:
        stand_in.is_dead = True
    with pytest.raises(EngineLost, match="rollout engine B is lost at /join"):
        world.engine()
