"""A rollout server: one vLLM in its own process, behind a few HTTP routes.

    python -m exgrpo_fast.rollout.server.server < settings.json

vLLM's own routes for new weights exist only in its developer mode, outside its key and partly over
pickle. Here the list of routes is the one below, each asks for the key, and nothing is pickled:

    POST /generate   requests -> a line per completion, and one a second while it makes progress
    POST /join       how weights will come (weight_transfer.py)
    POST /update     new weights; running requests go on with them, and say from which token on
    POST /pause, /resume
    GET  /health

It listens on a Unix socket, or on loopback by default, and ends with the process that
holds the other end of its standard input. The engine belongs to the main thread, which steps it
and runs commands between two steps; the web server has a separate thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
from starlette.requests import Request as HttpRequest  # pyright: ignore[reportMissingImports]
from starlette.responses import JSONResponse, Response, StreamingResponse  # pyright: ignore[reportMissingImports]
from starlette.routing import Route  # pyright: ignore[reportMissingImports]

from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.server.weight_transfer import Receiver, make_receiver
from exgrpo_fast.rollout.vllm.model import VllmModel
from exgrpo_fast.rollout.wire import pack_completion, unpack_requests

Endpoint = Callable[[HttpRequest], Awaitable[Response]]
BEAT_SECONDS = 1.0
MAX_BODY_BYTES = 256 << 20


class ServerSettings(BaseModel):
    """What the process reads from its standard input."""

    model_config = ConfigDict(extra="forbid")

    model: dict[str, Any]  # the keyword arguments of VllmModel
    key: str  # every request carries it as its bearer token
    socket: str | None = None  # path of a Unix socket
    host: str = "127.0.0.1"
    port: int = 0
    stay: bool = False  # do not end with the standard input: started by hand


@dataclass(frozen=True)
class Delivery:
    """Where the completions of one POST /generate go: a queue of the web server's loop."""

    put: Callable[[dict[str, Any] | None], None]
    place_of: dict[str, int]  # keys still open


class EngineLoop:
    """The main thread: run queued commands, step the engine, deliver finished completions."""

    def __init__(self, model: VllmModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.deliveries: list[Delivery] = []
        self.receiver: Receiver | None = None
        self.paused = False
        self.stopping = False
        self.progress = 0  # steps and commands done; constant when the engine hangs

    def run(self) -> None:
        while not self.stopping:
            self._run_commands(wait=self.paused or not self.model.running)
            if self.model.running and not self.paused:
                self._step()

    def _run_commands(self, *, wait: bool) -> None:
        """Run all queued commands; `wait`: for one where there is none."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.commands.get(block=wait)()
                self.progress += 1
                wait = False

    def ask(self, command: Callable[[], Any]) -> Future[Any]:
        """Queue a command to run between two steps; called from the web server's thread."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

        self.commands.put(run)
        return future

    # --- commands ---

    def generate(
        self, requests: list[Request], sampling: Sampling, put: Callable[[dict | None], None]
    ) -> Delivery:
        delivery = Delivery(put, {})
        try:
            for place, request in enumerate(requests):
                delivery.place_of[self.model.add(request, sampling)] = place
        except ValueError:
            self.abandon(delivery)
            raise
        self.deliveries.append(delivery)
        self._close_finished()
        return delivery

    def abandon(self, delivery: Delivery) -> None:
        """Its reader has gone: drop what has not finished."""
        self.model.drop_requests(list(delivery.place_of))
        delivery.place_of.clear()
        self._close_finished()

    def join(self, introduction: dict[str, Any]) -> None:
        if not self.model.usable:
            raise ValueError("vLLM lost its weights when an update broke off; start it again")
        self.receiver = make_receiver(introduction, self.device)

    def update(self, announced: dict[str, Any], version: int) -> None:
        if self.receiver is None:
            raise ValueError("POST /join comes before /update")
        if not self.model.reports_versions:
            while self.model.running:  # their tokens would have no version
                self._step()
        with contextlib.closing(self.receiver.receive(announced)) as weights:
            self.model.load(weights, version)

    def pause(self, paused: bool) -> None:
        self.paused = paused

    def stop(self) -> None:
        self.stopping = True

    # --- steps ---

    def _step(self) -> None:
        self.model.step()
        for delivery in self.deliveries:
            for key, completion in self.model.take(delivery.place_of).items():
                delivery.put(pack_completion(delivery.place_of.pop(key), completion))
        self.progress += 1
        self._close_finished()

    def _close_finished(self) -> None:
        for delivery in [d for d in self.deliveries if not d.place_of]:
            delivery.put(None)
            self.deliveries.remove(delivery)


# --- the routes -----------------------------------------------------------------------------------


def make_app(loop: EngineLoop, key: str) -> Starlette:
    async def generate(request: HttpRequest) -> Response:
        try:
            requests, sampling = unpack_requests(await read_json(request))
        except (KeyError, TypeError, ValueError) as error:
            return refusal(400, f"not a generation request: {error}")
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def put(line: dict[str, Any] | None) -> None:
            here.call_soon_threadsafe(lines.put_nowait, line)

        try:
            delivery = await asyncio.wrap_future(
                loop.ask(lambda: loop.generate(requests, sampling, put))
            )
        except ValueError as error:
            return refusal(400, str(error))
        return StreamingResponse(stream(loop, delivery, lines), media_type="application/jsonl")

    commands: dict[str, Callable[[dict[str, Any]], None]] = {
        "join": loop.join,
        "update": lambda body: loop.update(body["announced"], int(body["version"])),
        "pause": lambda body: loop.pause(True),
        "resume": lambda body: loop.pause(False),
    }

    def answering(command: Callable[[dict[str, Any]], None]) -> Endpoint:
        """Runs one command; a failure is reported in one line."""

        async def answer(request: HttpRequest) -> Response:
            try:
                body = await read_json(request)
                result = await asyncio.wrap_future(loop.ask(lambda: command(body)))
            except Exception as error:
                return refusal(400, f"{type(error).__name__}: {error}")
            return JSONResponse({"result": result})

        return answer

    async def health(request: HttpRequest) -> Response:
        model = loop.model
        return JSONResponse(
            {
                "pid": os.getpid(),
                "version": model.version,
                "running": len(model.running),
                "progress": loop.progress,
                "paused": loop.paused,
                "max_model_len": model.max_model_len,
            }
        )

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def check(request: HttpRequest) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                return refusal(401, "the key is missing or wrong")
            return await endpoint(request)

        return check

    posts = {"generate": generate} | {name: answering(c) for name, c in commands.items()}
    routes = [Route(f"/{name}", guarded(f), methods=["POST"]) for name, f in posts.items()]
    return Starlette(routes=[*routes, Route("/health", guarded(health), methods=["GET"])])


async def stream(
    loop: EngineLoop, delivery: Delivery, lines: asyncio.Queue[dict[str, Any] | None]
) -> AsyncIterator[str]:
    """One JSON line per completion; an empty one while others are waited for with progress."""
    seen = -1
    try:
        while True:
            try:
                line = await asyncio.wait_for(lines.get(), BEAT_SECONDS)
            except TimeoutError:
                if loop.progress != seen:
                    seen = loop.progress
                    yield "{}\n"
                continue
            if line is None:
                return
            yield json.dumps(line) + "\n"
    finally:  # also where the reader hung up
        if delivery.place_of:
            loop.ask(lambda: loop.abandon(delivery))


async def read_json(request: HttpRequest) -> dict[str, Any]:
    """ValueError where the body is too long or no JSON object."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ValueError("the body is too long")
    found = json.loads(body or b"{}")
    if not isinstance(found, dict):
        raise ValueError("the body is no JSON object")
    return found


def refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status_code=status)


# --- the process ----------------------------------------------------------------------------------


def serve(settings: ServerSettings, on_ready: Callable[[int], None]) -> None:
    """Run until stopped. `on_ready` gets the port (0 for a Unix socket)."""
    device = torch.device(settings.model["device"])
    model = VllmModel(**settings.model)
    loop = EngineLoop(model, device)
    config = uvicorn.Config(
        make_app(loop, settings.key),
        uds=settings.socket,
        host=settings.host,
        port=settings.port,
        log_level="error",
        lifespan="off",
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.commands.put(loop.stop))
    if not settings.stay:
        threading.Thread(target=end_with_stdin, args=(loop, settings.socket), daemon=True).start()
    thread.start()
    while not web.started:
        if not thread.is_alive():
            raise SystemExit("the rollout server cannot listen")
        thread.join(0.01)
    on_ready(0 if settings.socket else web.servers[0].sockets[0].getsockname()[1])
    try:
        loop.run()
    finally:
        web.should_exit = True
        if loop.receiver is not None:
            loop.receiver.close()
        model.close()
        thread.join(5.0)


def end_with_stdin(loop: EngineLoop, socket: str | None) -> None:
    """Stop when standard input closes, which it does however the process at its other end ends."""
    while os.read(0, 4096):
        pass
    loop.commands.put(loop.stop)
    if socket is not None:
        shutil.rmtree(Path(socket).parent, ignore_errors=True)
    if loop.receiver is not None:
        loop.receiver.close()
    time.sleep(10.0)
    os._exit(1)  # the engine hangs


def main() -> None:
    settings = ServerSettings.model_validate_json(sys.stdin.readline())

    def report(port: int) -> None:
        print(json.dumps({"ready": True, "port": port}), flush=True)

    serve(settings, report)


if __name__ == "__main__":
    main()
