"""What is done to runs, one function for each entry of the table; each returns its figures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lives import (
    HOSTILE,
    REWARDS,
    Life,
    World,
    broken,
    leftovers,
    losses,
    newest,
    orphans,
    state_digest,
)
from safetensors.torch import load_file, save_file

from exgrpo_fast.run.checkpoint.format import Checkpoints
from exgrpo_fast.run.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    verify,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]


def kills(world: World, num_kills: int, rng: random.Random) -> Figures:
    """kill -9 at random moments of a run, until it has had so many; then it is compared."""
    out, phases, in_save, lost, failed = world.folder / "killed", Counter(), 0, [], 0
    done = 0
    while done < num_kills:
        life = Life(world.words(out, "--resume", "auto"), world.folder / "killed.log", out=out)
        _let_live(life, out, rng)
        in_flight = newest(out)
        life.send(signal.SIGKILL)
        if life.wait() != -signal.SIGKILL:
            failed += 1
            if failed > 3:
                break
            continue
        done += 1
        phases[life.phase] += 1
        in_save += any((out / "checkpoints").glob(".tmp-step_*"))
        after = newest(out)
        if (in_flight or 0) > (after or 0):
            lost.append(in_flight)
        failed += len(broken(out))
    life = Life(
        world.words(out, "--resume", "auto", "--stop-after", 3), world.folder / "killed.log"
    )
    failed += life.wait() != 0
    curve = losses(out)
    whole = world.folder / "unbroken"
    life = Life(world.words(whole, "--stop-after", len(curve)), world.folder / "unbroken.log")
    failed += life.wait() != 0
    expected = losses(whole)
    same = state_digest(out, len(curve)) == state_digest(whole, len(curve))
    return {
        "kills": done,
        "phases": dict(phases),
        "inside_a_save": in_save,
        "failed_resumes_or_broken_checkpoints": failed,
        "lost_committed_checkpoints": len(lost),
        "steps": len(curve),
        "losses_that_differ": sum(a != b for a, b in zip(curve, expected, strict=True)),
        "final_state_equal": same,
        "leftover_temporary_files": len(leftovers(out)),
        "orphans": _orphans_in_the_end(),
        "tracebacks": _tracebacks(world.folder / "killed.log"),
    }


def leaks(world: World, steps: int) -> Figures:
    """Resident memory and open descriptors over a long run, from its first third on."""
    out = world.folder / "long"
    words = world.words(out, "--stop-after", steps, "--checkpoint.every", 10)
    life = Life(words, world.folder / "long.log", out=out)
    seen: list[tuple[int, float, int]] = []  # (step, MiB, descriptors)
    while life.alive_for(0.5):
        if _has_metrics(out):
            step = (out / "metrics.jsonl").read_bytes().count(b"\n")
            descriptors = len(os.listdir(f"/proc/{life.pid}/fd"))
            seen.append((step, _resident_mib(life.pid), descriptors))
    late = [sample for sample in seen if steps // 3 < sample[0] < steps]
    slope = statistics.linear_regression([s for s, _, _ in late], [mib for _, mib, _ in late]).slope
    return {
        "steps": len(losses(out)),
        "exit": life.wait(),
        "resident_mib": [round(late[0][1], 1), round(late[-1][1], 1)],
        "mib_per_100_steps": round(100 * slope, 3),
        "descriptors": [min(d for _, _, d in late), max(d for _, _, d in late)],
    }


def _let_live(life: Life, out: Path, rng: random.Random) -> None:
    """A third dies at any time, starting included, a third within steps, a third while saving."""
    kind = rng.randrange(3)
    if kind == 0:
        life.alive_for(rng.uniform(0.0, 1.5))
        return
    while life.phase == "start" and life.alive_for(0.005):
        pass
    life.alive_for(rng.uniform(0.0, 1.0))
    while kind == 2 and not any((out / "checkpoints").glob(".tmp-step_*")):
        if not life.alive_for(0.001):
            return
    if kind == 2:
        life.alive_for(rng.uniform(0.0, 0.02))


def resumes(world: World, points: int) -> Figures:
    """Every step as the last one before a resume; the run ends as the unbroken one did."""
    whole, last = world.folder / "points", points + 2
    life = Life(
        world.words(whole, "--stop-after", last, "--checkpoint.keep", 99), world.folder / "p.log"
    )
    assert life.wait() == 0, life.said()
    expected, equal = losses(whole), 0
    for step in range(1, points + 1):
        out = world.folder / f"from_{step}"
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("rollouts"))
        words = world.words(
            out, "--resume", step, "--stop-after", last - step, "--checkpoint.keep", 99
        )
        life = Life(words, world.folder / "p.log")
        equal += (
            life.wait() == 0
            and losses(out) == expected
            and state_digest(out, last) == state_digest(whole, last)
        )
        shutil.rmtree(out)
    return {"points": points, "bitwise_equal": equal}


# --- damage ---------------------------------------------------------------------------------------


# Each returns the files of which one has to be named.


def truncate(file: Path, rng: random.Random) -> set[Path]:
    os.truncate(file, rng.randrange(file.stat().st_size))
    return {file}


def flip_a_bit(file: Path, rng: random.Random) -> set[Path]:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return {file}


def zero_a_page(file: Path, rng: random.Random) -> set[Path]:
    data = bytearray(file.read_bytes())
    pages = [i for i in range(0, len(data), 4096) if any(data[i : i + 4096])]
    start = rng.choice(pages)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)
    return {file}


def append(file: Path, rng: random.Random) -> set[Path]:
    with file.open("ab") as stream:
        stream.write(rng.choice([b"\0", b" ", b"\n", rng.randbytes(rng.randrange(1, 5000))]))
    return {file}


def remove(file: Path, rng: random.Random) -> set[Path]:
    file.unlink()
    return {file}


def spoil_header(file: Path, rng: random.Random) -> set[Path]:
    """The first bytes, where safetensors keeps its names and shapes and JSON its first key."""
    data = bytearray(file.read_bytes())
    place = rng.randrange(min(len(data), 64))
    data[place] = rng.choice([byte for byte in range(256) if byte != data[place]])
    file.write_bytes(data)
    return {file}


def swap(file: Path, rng: random.Random) -> set[Path]:
    root = _root_of(file)
    other = rng.choice([f for f in _files(root) if f.read_bytes() != file.read_bytes()])
    file.rename(root / "between")
    other.rename(file)
    (root / "between").rename(other)
    return {file, other}


def edit_manifest(file: Path, rng: random.Random) -> set[Path]:
    """Valid JSON still, with one entry that is another one."""
    path = _root_of(file) / MANIFEST
    manifest = json.loads(path.read_text())
    entry = manifest["files"][rng.choice(sorted(manifest["files"]))]
    changes: list[Callable[[], Any]] = [
        lambda: manifest.update(step=manifest["step"] + 1),
        lambda: entry.update(bytes=entry["bytes"] + 1),
        lambda: entry.update(xxh3_128=entry["xxh3_128"][::-1]),
        lambda: manifest["files"].popitem(),
        lambda: manifest["origin"].update(tokenizer="another"),
    ]
    rng.choice(changes)()
    path.write_text(json.dumps(manifest, indent=1))
    return {path}


def _root_of(file: Path) -> Path:
    return next(parent for parent in file.parents if (parent / MANIFEST).exists())


DAMAGES = [
    truncate,
    flip_a_bit,
    zero_a_page,
    append,
    spoil_header,
    remove,
    swap,
    edit_manifest,
]


def corruptions(world: World, each: int, rng: random.Random) -> Figures:
    """Damage to one file of a checkpoint: refused by name, the one before is taken."""
    source = world.folder / "unbroken" / "checkpoints"
    if not source.exists():
        log = world.folder / "unbroken.log"
        assert Life(world.words(source.parent, "--stop-after", 5), log).wait() == 0
    folder = world.folder / "damaged"
    named: dict[str, int] = {}
    walked_back = 0
    for damage in DAMAGES:
        found = 0
        for number in range(each):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            checkpoints = Checkpoints(folder)
            older, newer = (folder / f"step_{step}" for step in checkpoints.steps()[-2:])
            file = rng.choice(_files(newer))
            to_name = damage(file, rng)
            try:
                verify(newer)
            except CheckpointError as error:
                found += any(str(error).startswith(f"{path}:") for path in to_name)
            if number < 20:
                walked_back += checkpoints.newest_valid(lambda why: None) == older
        named[damage.__name__] = found
    return {
        "damages": each * len(DAMAGES),
        "named": sum(named.values()),
        "by_kind": named,
        "walked_back": f"{walked_back}/{min(each, 20) * len(DAMAGES)}",
    }


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# --- disks ----------------------------------------------------------------------------------------


def disks(world: World) -> Figures:
    """A tmpfs that is too small, one that is full for a while, one that is full for good."""
    one = Life(world.words(world.folder / "size", "--stop-after", 8), world.folder / "size.log")
    assert one.wait() == 0, one.said()
    size = max(
        sum(f.stat().st_size for f in _files(path))
        for path in (world.folder / "size" / "checkpoints").glob("step_*")
    )
    figures: Figures = {"checkpoint_bytes": size}
    for name, factor in (("small", 2.5), ("for_a_while", 6), ("for_good", 6)):
        out = world.folder / f"disk_{name}"
        mount = out / "checkpoints"
        mount.mkdir(parents=True)
        asked = ["mount", "-t", "tmpfs", "-o", f"size={int(size * factor)}", "none", str(mount)]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode:
            return {"skipped": f"no tmpfs can be mounted here: {done.stderr.strip()}"}
        try:
            figures[name] = _on_a_full_disk(world, out, mount, name)
        finally:
            subprocess.run(["umount", "--lazy", str(mount)], check=True)
    return figures


def _on_a_full_disk(world: World, out: Path, mount: Path, name: str) -> Figures:
    log = world.folder / f"disk_{name}.log"
    life = Life(world.words(out, "--stop-after", 40), log)
    filler = mount / "filler"
    if name != "small":
        while newest(out) is None and life.alive_for(0.02):
            pass
        _fill(filler)
    if name == "for_a_while":
        while "NOT SAVED" not in log.read_text() and life.alive_for(0.005):
            pass
        filler.unlink()
    code = life.wait()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "exit": code,
        "steps": len(rows),
        "save_failures": rows[-1]["save_failures"],
        "newest_checkpoint": newest(out),
        "truncated_checkpoints": len(broken(out)),
        "tracebacks": _tracebacks(log),
    }


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass


# --- signals and doubles --------------------------------------------------------------------------


def signals(world: World, times: int, rng: random.Random) -> Figures:
    """SIGTERM or SIGINT at a random moment: a checkpoint of that moment, its exit code, in time."""
    right, seconds, before_training, wrong = 0, [], 0, []
    out, log = world.folder / "signals", world.folder / "signals.log"
    for _ in range(times):
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        life = Life(world.words(out, "--resume", "auto"), log, out=out)
        life.alive_for(rng.uniform(0.1, 2.0))
        sent, phase = time.monotonic(), life.phase
        life.send(number)
        code = life.wait(30.0)
        seconds.append(time.monotonic() - sent)
        early = code == -number  # before the run had begun to listen: the signal's own default
        before_training += early
        saved = not losses(out) or newest(out) == len(losses(out)) if _has_metrics(out) else True
        if (code == 128 + number or early) and (early or saved) and not broken(out):
            right += 1
        else:
            wrong.append(f"{signal.Signals(number).name} in phase {phase}: exit {code}")
    return {
        "signals": times,
        "right": right,
        "wrong": wrong,
        "before_training": before_training,
        "seconds_max": round(max(seconds), 2),
        "orphans": _orphans_in_the_end(),
        "tracebacks": _tracebacks(log),
    }


def doubles(world: World, times: int) -> Figures:
    """Two starts at once into one folder: one goes on, one is refused; a kill frees the folder."""
    one_survivor, named = 0, 0
    out = world.folder / "double"
    for number in range(times):
        logs = [world.folder / f"double_{number}_{i}.log" for i in range(2)]
        pair = [Life(world.words(out, "--resume", "auto"), log) for log in logs]
        while all(life.alive_for(0.005) for life in pair):
            pass
        refused, other = pair if pair[0].code is not None else pair[::-1]
        one_survivor += refused.code == 2 and other.alive_for(0.05)
        named += f"writing there (process {other.pid} on " in refused.said()
        other.send(signal.SIGKILL)
        other.wait()
    return {"starts": times, "exactly_one_survivor": one_survivor, "first_named": named}


def refusal_seconds(world: World) -> Figures:
    """The same from a shell, imports and all: how long until the second run is refused."""
    out = world.folder / "shell"
    life = Life(world.words(out), world.folder / "shell.log")
    life.alive_for(1.5)
    start = time.monotonic()
    words = [w for w in world.words(out, "--resume", "auto") if w != "--no-supervise"]
    done = _shell(words)
    seconds = time.monotonic() - start
    life.send(signal.SIGKILL)
    life.wait()
    return {"exit": done.returncode, "seconds": round(seconds, 2)}


def _shell(words: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exgrpo_fast", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **more)


def supervised(world: World) -> Figures:
    """The whole command with its supervisor: the worker is killed, then stopped, then left alone."""
    out, log = world.folder / "supervised", world.folder / "supervised.log"
    words = [w for w in world.words(out, "--stop-after", 80) if w != "--no-supervise"]
    with log.open("w") as stream:
        command = [sys.executable, "-m", "exgrpo_fast", *words, "--deadline", str(DEADLINE)]
        run = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT)
    for number, after in ((signal.SIGKILL, 10), (signal.SIGSTOP, 40)):
        while (newest(out) or 0) < after and run.poll() is None:
            time.sleep(0.02)
        if run.poll() is None:
            os.kill(_worker_of(run.pid), number)
    stopped = time.monotonic()
    while "no sign of life" not in log.read_text() and run.poll() is None:
        time.sleep(0.02)
    noticed = time.monotonic() - stopped
    code = run.wait(300)
    whole = world.folder / "whole"
    assert Life(world.words(whole, "--stop-after", 80), log.with_name("whole.log")).wait() == 0
    return {
        "exit": code,
        "restarts": log.read_text().count("; restart "),
        "deadline_seconds": DEADLINE,
        "noticed_seconds": round(noticed, 1),
        "losses_that_differ": sum(a != b for a, b in zip(losses(out), losses(whole), strict=True)),
        "steps": len(losses(out)),
        "orphans": _orphans_in_the_end(),
    }


DEADLINE = 20  # seconds; starting may take six times as long, on a machine that others use as well


def _worker_of(supervisor: int) -> int:
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    return int(found[0])


# --- numbers and rewards --------------------------------------------------------------------------


def numbers(world: World) -> Figures:
    """NaN in a weight, an absurd rate, constant rewards, a reward that does its worst."""
    figures: Figures = {}
    out, log = world.folder / "nan", world.folder / "nan.log"
    assert Life(world.words(out, "--stop-after", 3), log).wait() == 0
    path = out / "checkpoints" / "step_3"
    weights = load_file(path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path / "hf" / "model.safetensors", metadata={"format": "pt"})
    write_manifest(path, 3, json.loads((path / MANIFEST).read_text())["origin"])
    code = Life(world.words(out, "--resume", "auto"), log).wait()
    newer = [step for step in Checkpoints(out / "checkpoints").steps() if step > 3]
    figures["nan_in_a_weight"] = {"exit": code, "newer_checkpoints": len(newer)}

    out, log = world.folder / "rate", world.folder / "rate.log"
    code = Life(world.words(out, "--train.lr", 1e20, "--train.warmup_steps", 0), log).wait()
    bad = sum(_not_finite(path) for path in (out / "checkpoints").glob("step_*"))
    figures["rate_1e20"] = {"exit": code, "checkpoints_with_nan": bad, **_said(log)}

    for name in ("always", "never"):
        out, log = world.folder / name, world.folder / f"{name}.log"
        reward = f"{REWARDS}:{name}"
        code = Life(world.words(out, "--stop-after", 20, reward=reward), log).wait()
        start = load_file(world.folder / "model" / "model.safetensors")
        end = load_file(out / "checkpoints" / "step_20" / "hf" / "model.safetensors")
        same = all(torch.equal(start[key], end[key]) for key in start)
        figures[f"reward_{name}"] = {"exit": code, "weights_bit_identical": same, **_said(log)}

    out, log = world.folder / "hostile", world.folder / "hostile.log"
    code = Life(world.words(out, "--stop-after", 5, reward=f"{HOSTILE}:hostile"), log).wait()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reasons = sum((Counter(row["reasons"]) for row in rows), Counter())
    figures["hostile_reward"] = {"exit": code, "steps": len(rows), "reasons": dict(reasons)}
    figures["hostile_reward"] |= {"orphans": _orphans_in_the_end(), **_said(log)}
    return figures


def folders(world: World) -> Figures:
    """The files of the log are removed under a run: it goes on, and its metrics have no gap."""
    out, log = world.folder / "unlinked", world.folder / "unlinked.log"
    life = Life(world.words(out, "--stop-after", 40, "--log.completions_every", 1), log)
    while (newest(out) or 0) < 5 and life.alive_for(0.01):
        pass
    remover = threading.Thread(target=lambda: [_remove_logs(out), time.sleep(0.2)] * 3)
    remover.start()
    code = life.wait()
    remover.join()
    steps = [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    gaps = steps != list(range(steps[0], 41))
    return {"exit": code, "gaps_after_the_removal": gaps, "newest": newest(out), **_said(log)}


def offline(world: World) -> Figures:
    """A run in a network namespace without a network: nothing but local files is asked for."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"]).returncode:
        return {"skipped": "no network namespace to be had"}
    out = world.folder / "offline"
    words = world.words(out, "--stop-after", 3)
    command = ["unshare", "-rn", sys.executable, "-m", "exgrpo_fast", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return {"exit": done.returncode, "steps": len(losses(out))}


def _remove_logs(out: Path) -> None:
    shutil.rmtree(out / "completions", ignore_errors=True)
    for name in ("metrics.jsonl", "run.log"):
        (out / name).unlink(missing_ok=True)


def _not_finite(path: Path) -> bool:
    return any(not t.isfinite().all() for t in load_file(path / "hf/model.safetensors").values())


def _has_metrics(out: Path) -> bool:
    return (out / "metrics.jsonl").exists()


def _said(log: Path) -> Figures:
    return {"tracebacks": _tracebacks(log)}


def _tracebacks(log: Path) -> int:
    return log.read_text(errors="replace").count("Traceback")


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _orphans_in_the_end() -> int:
    deadline = time.monotonic() + 15.0
    while (found := orphans()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
