"""Two rollout servers, of which one after the other is killed while a run uses them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from lives import Life, World, losses, state_digest

ROOT = Path(__file__).resolve().parents[2]
KEY = "chaos"
STAND_IN = [str(ROOT / "tests" / "stand_in_server.py")]
REAL = ["-m", "exgrpo_fast.rollout.server.server"]  # with vLLM
MODEL = {
    "eos_token_ids": [1],
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "kv_cache_bytes": 64 << 20,
}
KILL_SECONDS, ABSENT_SECONDS = 20.0, 3.0


class RolloutServer:
    """A server by hand, at a port that stays its own."""

    def __init__(self, world: World, number: int, *, is_real: bool, seconds: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.words = [sys.executable, *(REAL if is_real else STAND_IN)]
        settings: dict[str, Any] = {"key": KEY, "port": self.port}
        settings["model"] = MODEL | {"folder": str(world.folder / "model")}
        settings |= {"stay": True} if is_real else {"seconds": seconds}
        self.settings = json.dumps(settings).encode() + b"\n"
        self.log = world.folder / f"server_{number}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT
            )
        assert self.process.stdin is not None
        self.process.stdin.write(self.settings)
        self.process.stdin.flush()

    def wait_until_ready(self) -> None:
        while not _listens(self.port):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def servers(world: World, steps: int, *, is_real: bool = False) -> dict[str, Any]:
    """A run whose two servers are killed in turn, beside one whose servers live."""
    os.environ["EXGRPO_FAST_KEY"] = KEY
    whole, out = world.folder / "served", world.folder / "served_by_mortals"
    seconds = 0.0 if is_real else 0.25  # so that a stand-in's step takes some seconds, too
    both = [RolloutServer(world, n, is_real=is_real, seconds=0.0) for n in range(2)]
    whole_exit = _life(world, whole, both, steps).wait(600)
    for server in both:
        server.kill()
    both = [RolloutServer(world, n, is_real=is_real, seconds=seconds) for n in (2, 3)]
    life, kills = _life(world, out, both, steps), 0
    while life.alive_for(KILL_SECONDS):
        server = both[kills % 2]
        server.kill()
        kills += 1
        life.alive_for(ABSENT_SECONDS)
        server.start()
        if is_real:  # it takes longer to start than KILL_SECONDS
            server.wait_until_ready()
    code = life.wait()
    for server in both:
        server.kill()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    pairs = list(zip(losses(out), losses(whole), strict=True))
    return {
        "engine": "vLLM" if is_real else "stand-in",
        "exit": code,
        "exit_undisturbed": whole_exit,
        "kills": kills,
        "steps": len(rows),
        "requests_resent": sum(row["requests_resent"] for row in rows),
        "steps_with_one_server": sum(row["servers_live"] == 1 for row in rows),
        "losses_that_differ": sum(a != b for a, b in pairs),
        "final_state_equal": state_digest(out, steps) == state_digest(whole, steps),
        "steps_whose_questions_differ": sum(
            _questions(out, step) != _questions(whole, step) for step in range(1, steps + 1)
        ),
        "steps_whose_tokens_differ": sum(
            a["tokens_generated"] != b["tokens_generated"]
            for a, b in zip(
                rows,
                map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()),
                strict=True,
            )
        ),
        "staleness_max": max(row["staleness_max"] for row in rows),
        "tracebacks": life.said().count("Traceback"),
    }


def _life(world: World, out: Path, both: list[RolloutServer], steps: int) -> Life:
    urls = json.dumps([f"http://127.0.0.1:{server.port}" for server in both])
    words = f"""
        --rollout.engine vllm_server --rollout.server.weights broadcast
        --rollout.server.max_in_flight 6 --rollout.server.deadline_seconds 20
        --checkpoint.every 10 --log.completions_every 1 --stop-after {steps}
    """.split()
    for server in both:
        server.wait_until_ready()
    life_words = world.words(out, *words, "--rollout.server.urls", urls)
    return Life(life_words, out.with_suffix(".log"))


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _questions(out: Path, step: int) -> list[tuple[str, str]]:
    """(question, source) of every trajectory of a step, in order."""
    table = parquet.read_table(out / "completions" / f"step_{step:06d}.parquet")
    return [(row["question_id"], row["source"]) for row in table.to_pylist()]
