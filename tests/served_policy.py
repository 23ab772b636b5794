"""A rollout server without vLLM: transformers behind the routes that a trainer uses."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from exgrpo_fast.core.types import WeightSpan
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.server.weight_transfer import make_receiver
from exgrpo_fast.rollout.wire import pack_completion, unpack_requests


class ServedPolicy(ThreadingHTTPServer):
    """Answers a request whole, with the weights that it has when the request comes.

    `dies_at_version`: asked to generate with these weights it hangs up, and from then on always.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, eos_token_ids: list[int], dies_at_version: int | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.dies_at_version = dies_at_version
        self.is_dead = False
        self.policy = Policy(load_model(str(folder)))
        self.engine = TransformersEngine(
            self.policy, eos_token_ids=eos_token_ids, pad_token_id=eos_token_ids[0]
        )
        self.receiver: Any = None
        self.version = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def lines(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        with self.lock:
            return getattr(self, path.strip("/"))(body)

    def join(self, introduction: dict[str, Any]) -> list[dict[str, Any]]:
        self.receiver = make_receiver(introduction, torch.device("cpu"))
        return [{"result": None}]

    def update(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        ours = self.policy.model.state_dict()
        with torch.no_grad():
            for name, weight in self.receiver.receive(body["announced"]):
                ours[name].copy_(weight)
        self.version = body["version"]
        return [{"result": None}]

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        made = self.engine.generate(*unpack_requests(body))
        spans = [(WeightSpan(self.version, 0, len(c.token_ids)),) for c in made]
        stamped = [replace(c, weight_spans=s) for c, s in zip(made, spans, strict=True)]
        return [pack_completion(place, c) for place, c in enumerate(stamped)]


class Handler(BaseHTTPRequestHandler):
    server: ServedPolicy  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Of /health: that it answers."""
        self.reply([{"version": self.server.version}])

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.is_dead |= self.path == "/generate" and server.version == server.dies_at_version
        self.reply([] if server.is_dead else server.lines(self.path, body))

    def reply(self, lines: list[dict[str, Any]]) -> None:
        if self.server.is_dead:
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write("\n".join(map(json.dumps, lines)).encode())

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def served(
    folder: Path, eos_token_ids: list[int], dies_at_version: int | None = None
) -> Iterator[str]:
    """The URL of a server that ends with the block."""
    server = ServedPolicy(folder, eos_token_ids, dies_at_version)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
