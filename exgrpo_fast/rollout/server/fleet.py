"""The rollout servers of a run: which of them take part, and how the others come back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exgrpo_fast.rollout.engine import EngineLost, EngineRefused
from exgrpo_fast.rollout.server.process import ServerConnection

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # between two tries to reach a server that is left out


class Server:
    """One server: its connection, and how it is started again where that is ours to do."""

    def __init__(
        self, connection: ServerConnection, restart: Callable[[], ServerConnection] | None = None
    ) -> None:
        """`restart`: waits until the new process is ready; EngineLost where it does not become so.
        None: somebody else starts it again."""
        self.connection = connection
        self.restart = restart
        self.life = 0  # how often it was lost: errors of an earlier life do not count

    def __repr__(self) -> str:
        return self.connection.name


class Fleet:
    """Servers that are live, have joined and wait for weights, or are left out.

    A background thread retries each server that is left out: it restarts a process of ours, then
    asks the server to join. It takes part again once `admit` is called, when it has the current weights.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        introduction: Mapping[str, Any],
        *,
        deadline: float,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """`introduction`: the body of POST /join. EngineRefused where a server refuses it, and
        EngineLost where none answers; one that does not answer is left out."""
        self.servers = list(servers)
        self.introduction = dict(introduction)
        self.deadline = deadline
        self.retry_seconds = retry_seconds
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self._live = list(servers)
        self._joined: list[Server] = []
        self.lost_since: float | None = None  # when the last live one was lost
        self.last_error: EngineLost | None = None
        for server in servers:
            try:
                self._join(server)
            except EngineRefused:
                self.close()
                raise
            except EngineLost as error:
                self.leave_out(server, error, life=server.life)
        if not self._live:
            self.close()
            assert self.last_error is not None
            raise self.last_error

    @property
    def live(self) -> list[Server]:
        with self.lock:
            return list(self._live)

    def take_joined(self) -> list[Server]:
        """Those that came back since the last call and have no weights yet."""
        with self.lock:
            joined, self._joined = self._joined, []
            return joined

    def admit(self, server: Server) -> None:
        """It has the current weights."""
        with self.lock:
            if server not in self._live:
                self._live.append(server)
                log.warning("rollout engine %s takes part again", server)
            self.lost_since = None

    def leave_out(self, server: Server, error: EngineLost, *, life: int) -> None:
        """From now on, until it is admitted again. Nothing where its `life` is over already."""
        with self.lock:
            if server.life != life or self.closed.is_set():
                return
            server.life += 1
            if server in self._live:
                self._live.remove(server)
            if not self._live:
                self.lost_since = self.lost_since or time.monotonic()
            self.last_error = error
        log.warning("%s; it is left out and tried again", error)
        threading.Thread(target=self._bring_back, args=(server,), daemon=True).start()

    def raise_if_lost_for(self, seconds: float) -> None:
        """EngineLost where no server has been live for so long."""
        with self.lock:
            since = self.lost_since
        if since is not None and time.monotonic() - since > seconds:
            raise EngineLost(
                f"no rollout server came back within {seconds:g} s of the last one's loss: "
                f"{self.last_error}"
            )

    def _join(self, server: Server) -> None:
        server.connection.post("/join", self.introduction, deadline=self.deadline)

    def _bring_back(self, server: Server) -> None:
        while not self.closed.wait(self.retry_seconds):
            try:
                if server.restart is not None:
                    server.connection = server.restart()
                self._join(server)
            except EngineLost as error:
                self.last_error = error
                continue
            with self.lock:
                self._joined.append(server)
            return

    def close(self) -> None:
        """No server is tried again."""
        self.closed.set()
