"""Lives of tiny training runs: forked from one process that has imported torch once.

A life is the command line itself, `exgrpo-fast train`, in a process of its own; what a fork saves is
the seconds of importing, so that hundreds of lives fit into minutes on one core.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash

import exgrpo_fast.cli.train_run  # noqa: F401  what a life would spend seconds on
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.cli import main
from exgrpo_fast.core.heartbeat import Supervised
from exgrpo_fast.run.checkpoint.format import Checkpoints
from exgrpo_fast.run.checkpoint.manifest import CheckpointError, verify

REWARDS = Path(__file__).resolve().parents[1] / "reward_functions.py"
HOSTILE = Path(__file__).with_name("hostile_rewards.py")


class World:
    """A folder with a tiny model and questions, and the words that train on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.set_num_threads(1)
        tokenizer = make_tokenizer(["What is 1 + 2? <answer>3</answer>\n"] * 3, vocab_size=300)
        make_model(tokenizer, seed=0, layers=2, width=64).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(24)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(self, out: Path, *more: object, reward: str = f"{REWARDS}:even_length") -> list[str]:
        fixed = f"""
            train exgrpo --out {out} --model.name {self.folder / "model"} --data.train
            {self.folder / "rows.jsonl"} --data.check_answers false --reward.functions [{reward}]
            --reward.workers 1 --reward.timeout_seconds 1 --rollout.prompts_per_step 4
            --rollout.group_size 4 --rollout.max_completion_tokens 8 --replay.start_success_rate 0
            --replay.retire false --replay.store.max_per_question 2 --train.lr 1e-3
            --train.minibatches 2 --train.warmup_steps 8 --train.max_steps 4000
            --train.max_tokens_per_microbatch 640 --checkpoint.every 1 --log.completions_every 1000
            --device cpu --deterministic --no-supervise
        """.split()
        return [*fixed, *map(str, more)]


class Life:
    """One process; `phase` is what it was last heard to be in."""

    def __init__(self, words: Sequence[str], log: Path, *, out: Path | None = None) -> None:
        """`out`: its run folder, where its phases are of interest."""
        self.started = time.monotonic()
        self.phase = "start"
        self.log = log
        self.code: int | None = None
        self._reader, writer = os.pipe()
        lock = -1
        if out is not None:
            out.mkdir(exist_ok=True)
            lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
            words = [*words, "--supervised", str(Supervised(os.getpid(), writer, lock))]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _live(words, log)
        os.close(writer)
        if lock >= 0:
            os.close(lock)

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code, -N for a signal; killed when it takes longer."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            self._listen(0.002)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.send(signal.SIGKILL)
        os.close(self._reader)
        return self.code

    def alive_for(self, seconds: float) -> bool:
        """Let it live so long; False when it ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.code is None:
            self._listen(min(0.01, max(deadline - time.monotonic(), 0.0)))
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def _listen(self, seconds: float) -> None:
        if not select.select([self._reader], [], [], seconds)[0]:
            return
        if beats := os.read(self._reader, 1 << 16):
            self.phase = beats.decode().split("\n")[-2]
        else:
            time.sleep(seconds)  # it has gone; waitpid says so soon


def _live(words: Sequence[str], log: Path) -> None:
    code = 1
    # As from a terminal: a shell has its background jobs ignore SIGINT, this suite perhaps among them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        main(list(words))
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


# --- what a life has left -------------------------------------------------------------------------


def losses(out: Path) -> list[str]:
    """The loss of every step as hex floats; ValueError where a step is missing or double."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{out}: steps {[row['step'] for row in rows][-5:]} at the end")
    return [row["loss_hex"] for row in rows]


def newest(out: Path) -> int | None:
    """The step of the newest checkpoint that verifies."""
    path = Checkpoints(out / "checkpoints").newest_valid(lambda why: None)
    return int(path.name.removeprefix("step_")) if path else None


def broken(out: Path) -> list[str]:
    """Checkpoint folders under their final name that do not verify."""
    found = []
    for path in (out / "checkpoints").glob("step_*"):
        try:
            verify(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if ".tmp" in path.name]


def state_digest(out: Path, step: int) -> str:
    """Of weights, moments, store, cursors and random states: every file but the manifest."""
    folder, hasher = out / "checkpoints" / f"step_{step}", xxhash.xxh3_128()
    for name in ("hf/model.safetensors", "state/tensors.safetensors", "state/trainer.json"):
        hasher.update((folder / name).read_bytes())
    return hasher.hexdigest()


def orphans() -> int:
    """Reward workers whose trainer is gone."""
    found = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            if b"exgrpo_fast.rewards.pool.worker" in (entry / "cmdline").read_bytes():
                found += int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == 1
    return found
