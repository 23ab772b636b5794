"""A rollout server without vLLM: the routes and the weight transfer of the real one, any drawing.

In the process of a test it is `Server.behave`; as a separate process

    PYTHONPATH=.:kernels python tests/stand_in_server.py < settings.json

it draws from a model by transformers, one request at a time, so that a completion does not depend on
what else is asked. `settings` are those of the real server, with "seconds" that a request takes more.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from http_server import Handler, Server, resets

from exgrpo_fast.core.types import Completion, WeightSpan
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.server.weight_transfer import Receiver, make_receiver
from exgrpo_fast.rollout.wire import pack_completion, unpack_requests

Draw = Callable[[Request, Sampling, int], Completion]  # the last: the version of the weights
CPU = torch.device("cpu")


class StandIn:
    """Serves as the rollout server does; what it has seen can be looked at."""

    def __init__(self, draw: Draw, *, key: str = "key") -> None:
        self.draw = draw
        self.key = key
        self.lock = threading.RLock()  # one request is drawn at a time
        self.start()

    def start(self) -> None:
        """As a new process begins: without weights but its folder's."""
        self.is_dead = False
        self.life = getattr(self, "life", 0) + 1
        self.version = 0
        self.receiver: Receiver | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.served: list[int] = []  # the seeds of what was delivered
        self.in_flight = self.most_in_flight = 0
        self.refusals = 0  # of the next requests for a generation
        self.broken_updates = 0  # so many of the next updates arrive changed

    def __call__(self, handler: Handler, number: int) -> None:
        if self.is_dead:
            return resets(handler, number)
        if handler.headers["Authorization"] != f"Bearer {self.key}":
            return handler.reply(401, b'{"error": "the key is missing or wrong"}')
        body = handler.server.seen[number]
        route = body["path"].removeprefix("/")
        try:
            if route == "generate":
                return self.generate(handler, number, body)
            result = {"health": self.health, "join": self.join, "update": self.update}[route](body)
        except Exception as error:
            if self.is_dead:
                return resets(handler, number)
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
            return handler.reply(400, text.encode())
        handler.reply(200, json.dumps(result).encode())

    def health(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"version": self.version}

    def join(self, body: dict[str, Any]) -> dict[str, Any]:
        self.receiver = make_receiver(body, CPU)
        return {}

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.receiver is not None, "POST /join comes before /update"
        arrived = {n: t.clone() for n, t in self.receiver.receive(body["announced"])}
        if self.broken_updates:
            self.broken_updates -= 1
            raise ValueError("a weight arrived changed")
        with self.lock:
            self.weights, self.version = arrived, body["version"]
        return {}

    def generate(self, handler: Handler, number: int, body: dict[str, Any]) -> None:
        if self.refusals:
            self.refusals -= 1
            return handler.reply(400, b'{"error": "it does not fit"}')
        requests, sampling = unpack_requests(body)
        life = self.life
        self.count(len(requests))
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        for place, request in enumerate(requests):
            with self.lock:
                if self.is_dead or life != self.life:
                    return resets(handler, number)
                completion = self.draw(request, sampling, self.version)
                if self.is_dead:
                    return resets(handler, number)
                self.served.append(request.seed)
            self.count(-1)
            line = json.dumps(pack_completion(place, completion)) + "\n"
            handler.wfile.write(line.encode())
        handler.close_connection = True

    def count(self, change: int) -> None:
        with handler_lock:
            self.in_flight += change
            self.most_in_flight = max(self.most_in_flight, self.in_flight)


handler_lock = threading.Lock()


def scripted(request: Request, sampling: Sampling, version: int) -> Completion:
    """Two tokens that follow from the seed alone."""
    tokens = torch.tensor([request.seed % 97, 1])
    return Completion(tokens, torch.tensor([-0.5, -0.25]), False, (WeightSpan(version, 0, 2),))


def main() -> None:
    from exgrpo_fast.model.policy import Policy, load_model
    from exgrpo_fast.rollout.hf.engine import TransformersEngine

    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    policy = Policy(load_model(settings["model"]["folder"]))
    engine = TransformersEngine(
        policy, eos_token_ids=settings["model"]["eos_token_ids"], pad_token_id=0
    )

    def draw(request: Request, sampling: Sampling, version: int) -> Completion:
        own = policy.model.state_dict()
        for name, weight in stand_in.weights.items():
            own[name].copy_(weight)
        time.sleep(settings.get("seconds", 0.0))
        (completion,) = engine.generate([request], sampling)
        span = WeightSpan(version, 0, len(completion.token_ids))
        return Completion(completion.token_ids, completion.logprobs, completion.truncated, (span,))

    stand_in = StandIn(draw, key=settings["key"])
    server = Server(settings["port"])
    server.behave = stand_in
    print(json.dumps({"ready": True, "port": server.server_address[1]}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
