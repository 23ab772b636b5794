"""Rollout servers: starting them, and talking to them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from exgrpo_fast.rollout.engine import EngineLost, EngineRefused

CONNECT_SECONDS = 10.0


class ServerConnection:
    """One rollout server, seen from the trainer. Every failure is an `EngineLost`, an answer that
    refuses an `EngineRefused`."""

    def __init__(
        self, *, name: str, key: str, socket: str | None = None, url: str = "http://server"
    ) -> None:
        transport = httpx2.HTTPTransport(uds=socket) if socket else None
        self.name = name
        self.client = httpx2.Client(
            transport=transport,
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,  # no proxy in between
        )

    def post(self, route: str, body: Mapping[str, Any], *, deadline: float) -> Any:
        """The answer of one command. `deadline`: seconds."""
        with self._losses(route, deadline) as timeout:
            response = self.client.post(route, json=body, timeout=timeout)
        return self._checked(response).get("result")

    def health(self, *, deadline: float = CONNECT_SECONDS) -> dict[str, Any]:
        with self._losses("/health", deadline) as timeout:
            response = self.client.get("/health", timeout=timeout)
        return self._checked(response)

    def lines(self, route: str, body: Mapping[str, Any], *, deadline: float) -> Iterator[dict]:
        """JSON lines of an answer; `deadline`: seconds that may pass without one."""
        with (
            self._losses(route, deadline) as timeout,
            self.client.stream("POST", route, json=body, timeout=timeout) as response,
        ):
            if response.status_code != 200:
                response.read()
                self._checked(response)
            for line in response.iter_lines():
                yield json.loads(line)

    def close(self) -> None:
        self.client.close()

    @contextlib.contextmanager
    def _losses(self, route: str, deadline: float) -> Iterator[httpx2.Timeout]:
        """The timeout of a request; an error of HTTP inside is an EngineLost."""
        try:
            yield httpx2.Timeout(deadline, connect=CONNECT_SECONDS)
        except httpx2.HTTPError as error:
            slow = isinstance(error, httpx2.TimeoutException)
            why = f"no progress for {deadline:g} s" if slow else str(error) or type(error).__name__
            raise EngineLost(f"rollout engine {self.name} is lost at {route}: {why}") from None

    def _checked(self, response: httpx2.Response) -> dict[str, Any]:
        try:
            found = dict(response.json())
        except (TypeError, ValueError):
            found = {"error": "an answer that is no JSON object; is this a rollout server?"}
        if response.status_code != 200 or "error" in found:
            # From 500 on the server itself failed.
            kind = EngineLost if response.status_code >= 500 else EngineRefused
            raise kind(
                f"rollout engine {self.name} refuses {response.request.url.path}: "
                f"{found.get('error', response.status_code)}"
            )
        return found


class ServerProcess:
    """A rollout server of our own: started, watched and ended here.

    It listens on a Unix socket in a folder that only this user may enter, and ends with this
    process even where that is killed.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        name: str = "0",
        gpu: int | None = None,
        log: Path | None = None,
    ) -> None:
        """`model`: keyword arguments of `VllmModel`; `gpu`: the only one that it will see."""
        self.folder = Path(tempfile.mkdtemp(prefix="exgrpo-fast-"))  # mode 0700
        self.name = name
        socket, key = str(self.folder / "socket"), secrets.token_urlsafe(32)
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        self.log_path = log or self.folder / "server.log"
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "exgrpo_fast.rollout.server.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C is the trainer's to answer
            )
        assert self.process.stdin is not None
        settings = {"model": dict(model), "key": key, "socket": socket}
        self.process.stdin.write(json.dumps(settings).encode() + b"\n")
        self.process.stdin.flush()
        self.connection = ServerConnection(name=name, key=key, socket=socket)

    def wait_until_ready(self, *, deadline: float) -> None:
        """EngineLost when it ends or is not ready after so many seconds."""
        assert self.process.stdout is not None
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            readable, _, _ = select.select([self.process.stdout], [], [], 0.5)
            line = self.process.stdout.readline() if readable else b""
            if line.startswith(b'{"ready": true'):
                return
            if readable and not line:  # it ends
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(30.0)
                break
        why = "has ended" if self.process.poll() is not None else f"not ready after {deadline:g} s"
        said = self.last_words()
        self.close()
        raise EngineLost(f"rollout engine {self.name} {why}{said}")

    def last_words(self) -> str:
        """The end of what it wrote, for the message about its end."""
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the process group; nothing of it is left behind."""
        self.connection.close()
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)
