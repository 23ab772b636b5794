"""Rollouts by one or more rollout servers, which generate while the trainer updates.

A server that dies, hangs or answers with old weights is left out, and its requests go to the others;
a request owns its seed, so the same tokens come from them. It takes part again once it has answered
and loaded the current weights.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    EngineLost,
    EngineRefused,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
)
from exgrpo_fast.rollout.server.dispatch import Dispatch, Post
from exgrpo_fast.rollout.server.fleet import RETRY_SECONDS, Fleet, Server
from exgrpo_fast.rollout.server.weight_transfer import BrokenTransfer, Sender
from exgrpo_fast.rollout.wire import pack_requests, unpack_completion

log = logging.getLogger(__name__)

Arrival = tuple[int, Completion] | EngineRefused

POLL_SECONDS = 0.02


@dataclass(eq=False)
class ServerEngine(RolloutEngine):
    """Spreads requests over its servers and gives all of them the policy's weights.

    `deadline`: seconds without progress of a server, or for an update, after which it counts as lost.
    `patience`: seconds to wait for one while all are lost. `close_servers` ends those that end with
    this engine.
    """

    servers: InitVar[Sequence[Server]]
    policy: Policy
    sender: Sender
    _: KW_ONLY
    deadline: float = 120.0
    patience: float = 600.0
    max_in_flight: int = 320  # requests of a generation that one server has at a time
    retry_seconds: InitVar[float] = RETRY_SECONDS
    close_servers: Callable[[], None] = lambda: None
    version: int = field(default=0, init=False)  # of the weights that the live servers have
    num_resent: int = field(default=0, init=False)  # requests since the last sync

    def __post_init__(self, servers: Sequence[Server], retry_seconds: float) -> None:
        self.fleet = Fleet(
            servers, self.sender.introduce(), deadline=self.deadline, retry_seconds=retry_seconds
        )

    def start(self, requests: Sequence[Request], sampling: Sampling) -> RemoteGeneration:
        return RemoteGeneration(self, requests, sampling)

    def sync(self, version: int) -> dict[str, float]:
        """EngineLost where no server has the weights, `patience` seconds after the last was lost."""
        self.version = version
        self.send_weights([*self.fleet.live, *self.fleet.take_joined()])
        while not self.fleet.live:
            HEARTBEAT.beat()
            self.admit_joined()
            time.sleep(POLL_SECONDS)
        resent, self.num_resent = self.num_resent, 0
        return {"servers_live": len(self.fleet.live), "requests_resent": resent}

    def admit_joined(self) -> None:
        """Give those that came back the weights. EngineLost where all have been lost for too long.

        The policy's weights must be those of the last sync, as they are whenever a generation is
        waited for.
        """
        if joined := self.fleet.take_joined():
            self.send_weights(joined)
        self.fleet.raise_if_lost_for(self.patience)

    def send_weights(self, servers: Sequence[Server]) -> None:
        """Those that have not loaded them afterwards are left out.

        A broadcast that loses one receiver breaks off for the others, too: those refuse, keep what
        they had, and take part in a second one.
        """
        lives = {server: server.life for server in servers}
        receivers = list(servers)
        for is_last in (False, True):
            refused = []
            receivers = [server for server in receivers if self._answers(server)]
            outcomes = self._transfer(receivers) if receivers else []
            for server, error in zip(receivers, outcomes, strict=True):
                if error is None:
                    self.fleet.admit(server)
                elif isinstance(error, EngineRefused) and not is_last:
                    refused.append(server)
                else:
                    self.fleet.leave_out(server, error, life=lives[server])
            receivers = refused

    def _answers(self, server: Server) -> bool:
        """Asked first: a broadcast waits long for one that is gone already."""
        life = server.life
        try:
            server.connection.health(deadline=self.deadline)
        except EngineLost as error:
            self.fleet.leave_out(server, error, life=life)
            return False
        return True

    def _transfer(self, servers: Sequence[Server]) -> list[EngineLost | None]:
        """The outcome of each server's update."""
        posts: list[Future[Any]] = []

        def announce(announced: Sequence[dict[str, Any]]) -> Callable[[], None]:
            for server, each in zip(servers, announced, strict=True):
                body = {"announced": each, "version": self.version}
                posts.append(
                    pool.submit(server.connection.post, "/update", body, deadline=self.deadline)
                )

            def finish() -> None:
                wait(posts)

            return finish

        weights = self.policy.named_weights()
        with ThreadPoolExecutor(len(servers)) as pool:
            try:
                self.sender.send(weights, announce, servers)
            except BrokenTransfer as error:
                log.warning("%s", str(error))
            for _ in weights:  # each is a collective of all ranks, which go through all of them
                pass
        return [as_lost(post.exception()) for post in posts]

    def close(self) -> None:
        self.fleet.close()
        self.close_servers()
        for server in self.fleet.servers:
            server.connection.close()
        self.sender.close()


def as_lost(error: BaseException | None) -> EngineLost | None:
    if error is None or isinstance(error, EngineLost):
        return error
    return EngineLost(f"rollout engine: {error!r}")


class RemoteGeneration:
    """One generation on all servers; a thread for each post reads what it delivers."""

    def __init__(
        self, engine: ServerEngine, requests: Sequence[Request], sampling: Sampling
    ) -> None:
        self.engine = engine
        self.requests = list(requests)
        self.sampling = sampling
        self.oldest_version = engine.version  # completions of older weights are generated again
        self.dispatch: Dispatch[Server] = Dispatch(len(requests), limit=engine.max_in_flight)
        self.lock = threading.Lock()  # of `dispatch` and `is_open`
        self.is_open = True
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._send_waiting()

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """EngineRefused where a server refuses the requests; EngineLost as `admit_joined`."""
        completions: dict[int, Completion] = {}
        try:
            while len(completions) < len(self.requests):
                batch = self._next_arrivals()
                for arrival in batch:
                    if isinstance(arrival, EngineRefused):
                        raise arrival
                finished = dict(arrival for arrival in batch if isinstance(arrival, tuple))
                completions |= finished
                if finished:
                    observer.finished(list(finished), list(finished.values()))
                observer.on_poll()
                self.engine.admit_joined()
                self._send_waiting()
        finally:
            with self.lock:
                self.is_open = False
                self.engine.num_resent += self.dispatch.num_returned
        return [completions[i] for i in range(len(self.requests))]

    def _next_arrivals(self) -> list[Arrival]:
        """All that have arrived, or none after a moment."""
        try:
            batch = [self.arrivals.get(timeout=POLL_SECONDS)]
        except queue.Empty:
            return []
        while not self.arrivals.empty():
            batch.append(self.arrivals.get())
        return batch

    def _send_waiting(self) -> None:
        """Post as many of the waiting requests as the live servers have room for."""
        live = self.engine.fleet.live
        with self.lock:
            posts = self.dispatch.assign(live) if self.is_open else []
        for post in posts:
            threading.Thread(target=self._read, args=(post, post.server.life), daemon=True).start()

    def _read(self, post: Post[Server], life: int) -> None:
        """All of one post; what it does not deliver waits again."""
        error: EngineLost | None = None
        try:
            self._read_completions(post)
        except EngineLost as found:
            error = found
        except Exception as found:  # `wait` would wait for a thread that has died for ever
            error = EngineLost(f"rollout engine {post.server}: {found!r}")
        with self.lock:
            missing = self.dispatch.end(post)
            is_open = self.is_open
        if missing and error is None:
            error = EngineLost(
                f"rollout engine {post.server} ended with {missing} completions missing"
            )
        if isinstance(error, EngineRefused):
            self.arrivals.put(error)
        elif error is not None and is_open:
            self.engine.fleet.leave_out(post.server, error, life=life)
        self._send_waiting()

    def _read_completions(self, post: Post[Server]) -> None:
        body = pack_requests([self.requests[i] for i in post.places], self.sampling)
        for line in post.server.connection.lines("/generate", body, deadline=self.engine.deadline):
            if not line:
                continue
            place, completion = unpack_completion(line)
            self._refuse_old(post.server, completion)
            with self.lock:
                is_new = self.dispatch.finish(post, post.places[place])
            if is_new:
                self.arrivals.put((post.places[place], completion))
            self._send_waiting()

    def _refuse_old(self, server: Server, completion: Completion) -> None:
        """EngineLost for weights older than those at the start of this generation: a server that
        was started again behind our back has those of its folder."""
        oldest = min((span.version for span in completion.weight_spans), default=None)
        if oldest is not None and oldest < self.oldest_version:
            raise EngineLost(
                f"rollout engine {server} has the weights of step {oldest}, those of step "
                f"{self.oldest_version} are due"
            )
