"""Rollout servers: real processes with the real vLLM, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from vllm_cases import ARGUMENTS, train_a_little

from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.engine import EngineLost, Request, Sampling, request_seed
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.server.fleet import Server
from exgrpo_fast.rollout.server.process import ServerConnection, ServerProcess
from exgrpo_fast.rollout.server.weight_transfer import BroadcastSender, SharedMemorySender
from exgrpo_fast.rollout.sync_check import VerifiedEngine

REQUESTS = [Request((5, 6, 7 + i % 3), request_seed(0, 1, str(i), i)) for i in range(12)]


@pytest.fixture(scope="module")
def servers(folders) -> Iterator[list[ServerProcess]]:
    started = [
        ServerProcess({"folder": str(folders["tied"]), **ARGUMENTS}, name=str(i)) for i in range(2)
    ]
    for server in started:
        server.wait_until_ready(deadline=180)
    yield started
    for server in started:
        server.close()


@pytest.fixture
def policy(folders) -> Policy:
    return Policy(load_model(str(folders["tied"])), temperature=0.7)


@pytest.fixture(params=["shared_memory", "broadcast"])
def engine(request, servers, policy) -> Iterator[VerifiedEngine]:
    if request.param == "shared_memory":
        sender = SharedMemorySender(torch.float32)
    else:
        sender = BroadcastSender(torch.float32, device=torch.device("cpu"))
    engine = ServerEngine([Server(s.connection) for s in servers], policy, sender, deadline=30)
    yield VerifiedEngine(engine, policy, prompt_ids=[5, 6, 7], max_model_len=512, tolerance=1e-4)
    sender.close()


def test_two_servers_stay_in_step_over_three_updates(engine, policy, servers) -> None:
    for version in (1, 2, 3):
        train_a_little(policy)
        engine.sync(version)
        completions = engine.generate(REQUESTS, Sampling(24, 0.7))
        scores = policy.score(
            Ragged.of([r.prompt_ids for r in REQUESTS]),
            Ragged.of([c.token_ids for c in completions]),
        ).split()
        for completion, (logprobs, _) in zip(completions, scores, strict=True):
            torch.testing.assert_close(completion.logprobs, logprobs, atol=1e-4, rtol=0)
            assert {span.version for span in completion.weight_spans} == {version}
    assert [s.connection.health()["version"] for s in servers] == [3, 3]


def update_in_flight(engine, servers, *, version: int, delay: float) -> list:
    """Completions that an update to `version` + 1 reached `delay` seconds after their start."""
    engine.sync(version)
    for server in servers:
        server.connection.post("/pause", {}, deadline=10)
    generation = engine.start(REQUESTS, Sampling(200, 0.7))
    while sum(s.connection.health()["running"] for s in servers) < len(REQUESTS):
        time.sleep(0.01)
    for server in servers:
        server.connection.post("/resume", {}, deadline=10)
    time.sleep(delay)
    engine.engine.sync(version + 1)
    return generation.wait()


def test_new_weights_in_the_middle_of_a_generation(engine, policy, servers) -> None:
    found: set[int] = set()
    completions = []
    # How long 200 tokens take depends on the machine: the update must fall inside them.
    for attempt, delay in enumerate((0.15, 0.05, 0.3, 0.02, 0.1)):
        version = 7 + 2 * attempt
        completions = update_in_flight(engine, servers, version=version, delay=delay)
        assert len(completions) == len(REQUESTS)
        found = {span.version for c in completions for span in c.weight_spans}
        assert found <= {version, version + 1}
        if len(found) == 2:
            break
    assert len(found) == 2, "no update fell into a generation"
    for completion in completions:
        ends = [span.end for span in completion.weight_spans]
        starts = [span.start for span in completion.weight_spans]
        assert starts == [0, *ends[:-1]] and ends[-1] == len(completion.token_ids)


# --- what it refuses ------------------------------------------------------------------------------


def raw(server: ServerProcess, key: str) -> httpx2.Client:
    transport = httpx2.HTTPTransport(uds=str(server.folder / "socket"))
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.Client(transport=transport, base_url="http://server", headers=headers)


@pytest.mark.parametrize("route", ["generate", "join", "update", "pause", "resume"])
def test_every_route_asks_for_the_key(servers, route: str) -> None:
    with raw(servers[0], "wrong") as client:
        assert client.post(f"/{route}", json={}).status_code == 401
        assert client.get("/health").status_code == 401


@pytest.mark.parametrize(
    "route",
    ["collective_rpc", "init_weight_transfer_engine", "update_weights", "sleep", "v1/models"],
)
def test_vllms_own_routes_are_not_there(servers, route: str) -> None:
    with raw(servers[0], "wrong") as client:
        assert client.post(f"/{route}", json={}).status_code == 404


@pytest.mark.parametrize(
    ("route", "body", "why"),
    [
        ("/generate", {"requests": [{}], "sampling": {}}, "not a generation request"),
        (
            "/generate",
            {
                "requests": [{"prompt_ids": [5] * 600, "seed": 1}],
                "sampling": {"max_completion_tokens": 8},
            },
            "do not fit",
        ),
        ("/update", {"version": 1}, "announced"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(servers, route, body, why) -> None:
    with pytest.raises(EngineLost, match=why) as found:
        servers[0].connection.post(route, body, deadline=10)
    assert "\n" not in str(found.value)
    assert servers[0].connection.health()["running"] == 0


def test_the_socket_is_for_its_user_alone(servers) -> None:
    assert servers[0].folder.stat().st_mode & 0o077 == 0


# --- when it dies ---------------------------------------------------------------------------------


def alone(folders) -> ServerProcess:
    server = ServerProcess({"folder": str(folders["untied"]), **ARGUMENTS}, name="lone")
    server.wait_until_ready(deadline=180)
    return server


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_is_noticed(folders, how) -> None:
    policy = Policy(load_model(str(folders["untied"])))
    server = alone(folders)
    deadline = 4.0
    sender = SharedMemorySender(torch.float32)
    engine = ServerEngine(
        [Server(server.connection)],
        policy,
        sender,
        deadline=deadline,
        patience=1.0,
        close_servers=server.close,
    )
    generation = engine.start(REQUESTS * 4, Sampling(400))
    os.kill(server.process.pid, how)
    start = time.monotonic()
    with pytest.raises(EngineLost, match="rollout engine lone is lost at /generate"):
        generation.wait()
    assert time.monotonic() - start < deadline + 6.0
    engine.close()
    assert is_gone(server.process.pid)
    assert not server.folder.exists() and not sender.folder.exists()


def test_a_server_that_cannot_start_says_why(tmp_path) -> None:
    server = ServerProcess({"folder": str(tmp_path / "nothing"), **ARGUMENTS}, name="lone")
    with pytest.raises(EngineLost, match="rollout engine lone has ended: .*nothing"):
        server.wait_until_ready(deadline=120)
    assert not server.folder.exists()


TRAINER = """
import os, sys, time, torch
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.rollout.server.engine import ServerEngine
from exgrpo_fast.rollout.server.fleet import Server
from exgrpo_fast.rollout.server.process import ServerProcess
from exgrpo_fast.rollout.server.weight_transfer import SharedMemorySender
arguments = {arguments}
server = ServerProcess(arguments)
server.wait_until_ready(deadline=180)
sender = SharedMemorySender(torch.float32)
engine = ServerEngine([Server(server.connection)], Policy(load_model(arguments["folder"])), sender)
print(server.process.pid, server.folder, sender.folder, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_behind_a_killed_trainer(folders) -> None:
    arguments = {"folder": str(folders["untied"]), **ARGUMENTS}
    code = TRAINER.format(arguments=arguments)
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid, socket_folder, weights_folder = trainer.stdout.readline().split()
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 15
    left = [Path(socket_folder), Path(weights_folder)]
    while time.monotonic() < until and not (
        is_gone(int(pid)) and not any(p.exists() for p in left)
    ):
        time.sleep(0.1)
    assert is_gone(int(pid))
    assert [path for path in left if path.exists()] == []


def test_a_server_that_nobody_started_here_is_found_by_its_address() -> None:
    connection = ServerConnection(name="http://127.0.0.1:9", key="k", url="http://127.0.0.1:9")
    with pytest.raises(EngineLost, match="http://127.0.0.1:9 is lost at /health"):
        connection.health(deadline=2)
