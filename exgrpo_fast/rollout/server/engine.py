"""Rollouts by one or more rollout servers, which generate while the trainer updates."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    AsyncEngine,
    EngineLost,
    Observer,
    Request,
    Sampling,
)
from exgrpo_fast.rollout.server.process import ServerConnection, ServerProcess
from exgrpo_fast.rollout.server.weight_transfer import Sender
from exgrpo_fast.rollout.server.wire import pack_requests, unpack_completion

Arrival = tuple[int, Completion] | EngineLost | None  # None: one server has delivered everything


class ServerEngine(AsyncEngine):
    """Spreads requests over its servers and gives all of them the policy's weights."""

    def __init__(
        self,
        connections: Sequence[ServerConnection],
        policy: Policy,
        sender: Sender,
        *,
        processes: Sequence[ServerProcess] = (),
        deadline: float = 120.0,
    ) -> None:
        """`processes`: those that end with this engine. `deadline`: seconds without progress of a
        server, or for an update, after which it counts as lost."""
        self.connections = list(connections)
        self.processes = list(processes)
        self.policy = policy
        self.sender = sender
        self.deadline = deadline
        for rank, connection in enumerate(self.connections, start=1):
            connection.post("/join", sender.introduce(rank), deadline=deadline)

    def start(self, requests: Sequence[Request], sampling: Sampling) -> RemoteGeneration:
        return RemoteGeneration(self.connections, requests, sampling, deadline=self.deadline)

    def sync(self, version: int) -> dict[str, float]:
        """EngineLost where a server did not load the weights."""

        def announce(announced: dict[str, Any]) -> Callable[[], None]:
            body = {"announced": announced, "version": version}
            posts = [
                pool.submit(c.post, "/update", body, deadline=self.deadline)
                for c in self.connections
            ]

            def wait() -> None:
                for post in posts:
                    post.result()

            return wait

        with ThreadPoolExecutor(len(self.connections)) as pool:
            self.sender.send(self.policy.named_weights(), announce)
        return {}

    def close(self) -> None:
        for process in self.processes:
            process.close()
        for connection in self.connections:
            connection.close()
        self.sender.close()


class RemoteGeneration:
    """One generation on all servers; a thread for each of them reads what it delivers."""

    def __init__(
        self,
        connections: Sequence[ServerConnection],
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        deadline: float,
    ) -> None:
        self.num_requests = len(requests)
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.num_open = 0
        for server, connection in enumerate(connections):
            # Neighbours in the list share a question: each server meets its prompt, and caches it.
            mine = list(range(server, len(requests), len(connections)))
            if mine:
                body = pack_requests([requests[i] for i in mine], sampling)
                arguments = (connection, body, mine, deadline)
                threading.Thread(target=self._read, args=arguments, daemon=True).start()
                self.num_open += 1

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """EngineLost as soon as one of the servers is."""
        completions: dict[int, Completion] = {}
        while self.num_open:
            batch = self._next_arrivals()
            for arrival in batch:
                if isinstance(arrival, EngineLost):
                    raise arrival
            finished = dict(arrival for arrival in batch if isinstance(arrival, tuple))
            self.num_open -= sum(arrival is None for arrival in batch)
            completions |= finished
            if finished:
                observer.finished(list(finished), list(finished.values()))
            observer.on_poll()
        return [completions[i] for i in range(self.num_requests)]

    def _next_arrivals(self) -> list[Arrival]:
        """All that have arrived, or none after a moment."""
        try:
            batch = [self.arrivals.get(timeout=0.02)]
        except queue.Empty:
            return []
        while not self.arrivals.empty():
            batch.append(self.arrivals.get())
        return batch

    def _read(
        self, connection: ServerConnection, body: dict[str, Any], mine: list[int], deadline: float
    ) -> None:
        try:
            missing = len(mine)
            for line in connection.lines("/generate", body, deadline=deadline):
                if line:
                    place, completion = unpack_completion(line)
                    self.arrivals.put((mine[place], completion))
                    missing -= 1
            if missing:
                raise EngineLost(
                    f"rollout engine {connection.name} ended with {missing} completions missing"
                )
        except EngineLost as error:
            self.arrivals.put(error)
        except Exception as error:  # `wait` would wait for a thread that has died for ever
            self.arrivals.put(EngineLost(f"rollout engine {connection.name}: {error!r}"))
        else:
            self.arrivals.put(None)
