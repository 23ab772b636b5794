"""How fast and how large is the experience store, beside one of plain Python?

    python bench/experience.py [--device cuda] [--questions 45000 --trajectories 200000]

The store of `exgrpo_fast/experience/replay` and `Plain`, dicts of lists of tensors that are handled one
trajectory at a time (`experience_sides.py`), are filled with the same steps and answer the same calls, in turns in one
process. Their answers are compared, too. Trajectories have log-normal lengths; every ninth
question has 16 of them, the others share the rest. Of the 1,024 of a step 32 are copies: 16 of
trajectories of this step, 16 of the step before.

    add      keep the 1,024 trajectories of a step
    draw     64 questions by Gaussian buckets, and the rows of 64 questions that have 16 each
    gather   those 1,024 trajectories and their prompts as packs of at most 32,768 tokens
    choose   the trajectory of the lowest key of each of the 64
    update   128 groups of a step: 16 questions retire, 112 move to another bucket

`Plain` looks questions up in a set ("plain"), or scans a list of them for each question of each
bucket ("list scan"), as the published code of ExGRPO does (ElliottYan/LUFFY, experience_helpers.py,
`uid in valid_exp_uids`): quadratic in the questions stored. The store's own work grows with its
capacity, which is the same throughout.

Memory and checkpoints are measured in a process of their own, which holds one store and no peer.
Writes experience.json and experience.png.
"""

import argparse
import ctypes
import datetime
import functools
import gc
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experience_sides import (
    ASKED,
    EVERY,
    GROUP_SIZE,
    PACK_TOKENS,
    PER_STEP,
    RICH,
    VISITED,
    Ours,
    Plain,
    Workload,
)
from figures import panels
from loss import machine, resident
from torch import Tensor

from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot
from exgrpo_fast.model.packing import Pack, pack
from exgrpo_fast.run.checkpoint.format import Checkpoints, load_state

# ExGRPO at 1.5B on 8 H100, average over its run: arXiv 2510.02245, table 8.
STEP_SECONDS = 188.9
SHARE_ALLOWED = 0.01  # of a step, for each of add, draw and gather
SIZES = (1000, 5000, 20000)  # stored questions, and all of them
PICKLED = 1 / 50  # share of the plain store whose pickling is timed; the result is scaled up


# ---- measuring -----------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


Times = dict[str, list[float]]
Calls = Mapping[str, Callable[[int], object]]


def in_turns(calls: Calls, repeats: int, device: str) -> Times:
    """The times of each call; it is given the number of the round."""
    times: Times = {name: [] for name in calls}
    for round_number in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(functools.partial(call, round_number), device))
    return times


def row_of(operation: str, times: Times) -> dict:
    """Medians in ms; ratios are taken round by round, so a slow minute weighs on both sides."""
    ours = times["ours"]
    row: dict = {"operation": operation, "rounds": len(ours)}
    for name, values in times.items():
        row[f"{name}_ms"] = 1e3 * statistics.median(values)
        row[f"{name}_fastest_ms"] = 1e3 * min(values)
        if name != "ours":
            ratios = [a / b for a, b in zip(ours, values, strict=False)]
            row[f"ours_to_{name}"] = statistics.median(ratios)
    row["share_of_step"] = statistics.median(ours) / STEP_SECONDS
    row["share_of_allowed"] = row["share_of_step"] / SHARE_ALLOWED
    return row


def measure_draw(ours: Ours, plain: Plain, stored: int, arguments) -> Times:
    """The draws agree; the list scan is timed in fewer rounds."""
    rich = rich_questions(stored)
    assert sorted(ours.draw(random(0))) == sorted(plain.draw(random(0))), "the draws differ"

    def once(store: Ours | Plain, round_number: int, **options) -> None:
        store.draw(random(round_number), **options)
        store.rows(rich)

    device = arguments.device
    calls = {"ours": functools.partial(once, ours), "plain": functools.partial(once, plain)}
    times = in_turns(calls, arguments.repeats, device)
    scan = {"scan": functools.partial(once, plain, scan=True)}
    return times | in_turns(scan, arguments.slow_repeats, device)


def random(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


def rich_questions(stored: int) -> list[int]:
    """64 of those that have 16 trajectories, from all over the store."""
    complete = range(0, stored - 1, EVERY)
    return [complete[i * len(complete) // ASKED] for i in range(ASKED)]


def fill(workload: Workload, ours: Ours, plain: Plain, arguments) -> list[dict]:
    """Both grow step by step; at some sizes the last adds are looked at, and draws are timed."""
    sizes = [*(size for size in SIZES if size < arguments.questions), arguments.questions]
    times: Times = {"ours": [], "plain": []}
    found = []
    for i in range(workload.num_steps):
        step = workload.step(i)
        calls = {"ours": lambda _, s=step: ours.add(s), "plain": lambda _, s=step: plain.add(s)}
        spent = in_turns(calls, 1, arguments.device)
        if len(step.questions) == PER_STEP:  # the last step may be a short one
            times = {name: [*values, *spent[name]] for name, values in times.items()}
        brought = list(dict.fromkeys(step.questions))
        for store in (ours, plain):
            store.move(brought, workload.buckets[brought].tolist())
        if (stored := workload.stored_after(i)) >= sizes[0]:
            sizes = sizes[1:]
            adds = {name: values[-arguments.repeats :] for name, values in times.items()}
            draws = measure_draw(ours, plain, stored, arguments)
            size = {"questions": stored, "trajectories": ours.store.num_trajectories}
            found.append(size | {"rows": [row_of("add", adds), row_of("draw", draws)]})
    return found


def measure_gather(ours: Ours, plain: Plain, workload: Workload, arguments) -> list[dict]:
    """`gather` and its three parts; both sides give the same packs."""
    asked, prompts = rich_questions(arguments.questions), workload.prompts
    rows, kept, as_list = ours.rows(asked), plain.rows(asked), list(prompts.split())
    same_packs(ours.gather(rows, prompts), plain.gather(kept, as_list))
    found = ours.store.read(rows)
    picked = prompts.pick(found.question.cpu())
    device = arguments.device
    whole = in_turns(
        {
            "ours": lambda _: ours.gather(rows, prompts),
            "plain": lambda _: plain.gather(kept, as_list),
        },
        arguments.repeats,
        device,
    )
    parts: Calls = {
        "gather: read": lambda _: ours.store.read(rows),
        "gather: prompts": lambda _: prompts.pick(found.question.cpu()),
        "gather: pack": lambda _: pack(picked, found.tokens, max_tokens=PACK_TOKENS, device=device),
    }
    times = in_turns(parts, arguments.repeats, device)
    gathered = row_of("gather", whole) | {"tokens": len(found.tokens.values)}
    return [gathered, *(row_of(name, {"ours": values}) for name, values in times.items())]


def same_packs(ours: tuple[list[Pack], Tensor], plain: tuple[list[Pack], Tensor]) -> None:
    assert torch.equal(ours[1], plain[1]), "the log-probs differ"
    for a, b in zip(ours[0], plain[0], strict=True):
        for name in ("input_ids", "position_ids", "rows", "targets"):
            assert torch.equal(getattr(a, name), getattr(b, name)), f"{name} differ"


def measure_choose(ours: Ours, plain: Plain, arguments) -> dict:
    keys = torch.rand(ASKED * RICH, generator=torch.Generator().manual_seed(0))
    keys = keys.to(arguments.device)
    assert ours.choose(keys) == plain.choose(keys), "the choices differ"
    calls: Calls = {
        "ours": lambda _: ours.choose(keys),
        "plain": lambda _: plain.choose(keys),
    }
    return row_of("choose", in_turns(calls, arguments.repeats, arguments.device))


def measure_update(ours: Ours, plain: Plain, arguments) -> dict:
    """Other questions in each round: those that retire are gone."""
    order = random(0).permutation(arguments.questions)[: arguments.repeats * VISITED]
    visited = order.reshape(arguments.repeats, VISITED).tolist()
    buckets = random(1).integers(1, GROUP_SIZE, VISITED).tolist()
    calls: Calls = {
        "ours": lambda i: ours.update(visited[i], buckets),
        "plain": lambda i: plain.update(visited[i], buckets),
    }
    row = row_of("update", in_turns(calls, arguments.repeats, arguments.device))
    assert ours.store.bucket_sizes() == [len(of_one) for of_one in plain.members.values()]
    return row


def wait_of_add(workload: Workload, device: str) -> str | None:
    """The first time that `add` makes the host wait for the device; None = it never does."""
    ours = Ours(workload.plan(), device)
    ours.add(workload.step(0))
    step = workload.step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.add(step)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def pickled(plain: Plain) -> dict:
    """What `dill` of the published code does, of a part of the questions, scaled to all of them."""
    questions = list(plain.experience)[:: round(1 / PICKLED)]
    part = {question: plain.experience[question] for question in questions}
    scale = len(plain.experience) / len(part)
    start = time.perf_counter()
    text = pickle.dumps(part)
    middle = time.perf_counter()
    pickle.loads(text)
    spent = time.perf_counter() - middle
    return {
        "plain_pickle_seconds": scale * (middle - start),
        "plain_unpickle_seconds": scale * spent,
        "plain_pickle_bytes": round(scale * len(text)),
        "plain_share_measured": 1 / scale,
    }


# ---- one store and nothing else ------------------------------------------------------------------


def alone(arguments: argparse.Namespace) -> dict:
    """Memory and checkpoints, in a process that holds nothing else."""
    workload = Workload(arguments)
    Ours(workload.plan(), arguments.device).add(workload.step(0))  # libraries, thread pools
    before = held(workload, arguments.device)
    ours = Ours(workload.plan(), arguments.device)
    made = held(workload, arguments.device)
    for i in range(workload.num_steps):
        ours.add(workload.step(i))
    filled, plan = held(workload, arguments.device), ours.store.plan
    ours.store.move(torch.arange(arguments.questions), workload.buckets)
    wanted = int(workload.lengths.sum()) * plan.page_bytes // plan.page_tokens
    memory = {
        "plan_bytes": plan.num_bytes,
        "store_bytes": ours.store.num_bytes,
        "grown_by_making_bytes": made - before,
        "grown_by_filling_bytes": filled - made,
        "measured_bytes": filled - before,
        "measured_to_plan": (filled - before) / plan.num_bytes,
        "store_to_plan": ours.store.num_bytes / plan.num_bytes,
        "tokens": int(workload.lengths.sum()),
        "tokens_to_plan": wanted / plan.num_bytes,
    }
    return {"memory": memory, "checkpoint": measure_checkpoint(ours, arguments)}


def held(workload: Workload, device: str) -> int:
    """Bytes in use: by tensors on CUDA, by the process on the CPU."""
    workload.forget()
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    # What the C library keeps for later is none of the store's.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return resident("VmRSS")


def measure_checkpoint(ours: Ours, arguments: argparse.Namespace) -> dict:
    """Snapshot, write (with checksums and fsync), load; what is loaded is what was saved."""
    names = [f"question {i}" for i in range(arguments.questions)]
    place_of = {name: i for i, name in enumerate(names)}
    times: Times = {"snapshot": [], "write": [], "load": []}
    saved, row = {}, {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        times[name].append(time.perf_counter() - start)
        return result

    def load(path: Path) -> dict:
        state = load_state(path)["store"]
        load_snapshot(ours.store, state, place_of)
        return state

    with tempfile.TemporaryDirectory() as name:
        folder = Checkpoints(Path(name), keep=1)
        for i in range(arguments.slow_repeats):
            before = start_peak(arguments.device)
            state = timed("snapshot", lambda: snapshot(ours.store, names))
            row.setdefault("snapshot_peak_bytes", peak(arguments.device) - before)
            same_snapshot(saved or state, state)
            path = timed("write", lambda i=i, s=state: folder.save(i, Path.mkdir, {"store": s}))
            row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            saved = timed("load", lambda p=path: load(p))
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    return {**medians, "rounds": arguments.slow_repeats, **row}


def same_snapshot(a: dict, b: dict) -> None:
    for name in ("lengths", "token_ids", "behaviour_logprobs"):
        assert torch.equal(a[name], b[name]), f"{name} changed"
    for name, values in a["trajectories"].items():
        assert torch.equal(values, b["trajectories"][name]), f"{name} changed"


def start_peak(device: str) -> int:
    """Bytes in use now; the maximum is counted from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def in_own_process(arguments: argparse.Namespace) -> dict:
    names = ("device", "questions", "trajectories", "tokens", "max_tokens", "logprob_dtype")
    names += ("slow_repeats", "seed")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    command = [sys.executable, __file__, "--alone", *options]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


# ---- everything ----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict:
    own = in_own_process(arguments)
    workload = Workload(arguments)
    device = arguments.device
    waits = {"wait_of_add": wait_of_add(workload, device)} if device == "cuda" else {}
    ours, plain = Ours(workload.plan(), device), Plain(device)
    by_size = fill(workload, ours, plain, arguments)
    kept = sum(len(of_one) for of_one in plain.experience.values())
    assert ours.store.num_trajectories == kept == arguments.trajectories, "copies were kept"
    rows = by_size[-1]["rows"] + measure_gather(ours, plain, workload, arguments)
    rows += [measure_choose(ours, plain, arguments), measure_update(ours, plain, arguments)]
    parameters = ("questions", "trajectories", "tokens", "max_tokens", "logprob_dtype", "seed")
    return {
        "bench": "experience",
        "date": datetime.date.today().isoformat(),
        **machine(device),
        **{name: getattr(arguments, name) for name in parameters},
        "load_average": round(os.getloadavg()[0], 2),  # above `threads`: others slowed this one
        "step_seconds": STEP_SECONDS,
        "step_source": "ExGRPO 1.5B on 8 H100, average: arXiv 2510.02245, table 8",
        "share_allowed": SHARE_ALLOWED,
        "rows": rows,
        "by_size": by_size,
        **waits,
        "memory": own["memory"],
        "checkpoint": own["checkpoint"] | pickled(plain),
    }


def print_results(results: dict) -> None:
    print(f"{'':16}{'ms':>9}{'plain':>9}{'scan':>10}{'x plain':>9}{'x scan':>9}{'of 1 % step':>13}")
    names = ("ours_ms", "plain_ms", "scan_ms", "ours_to_plain", "ours_to_scan")
    for size in [*results["by_size"][:-1], {"rows": results["rows"]}]:
        print(f"{size.get('questions', results['questions'])} questions")
        for row in size["rows"]:
            cells = (f"{row[n]:9.3f}" if n in row else f"{'-':>9}" for n in names)
            print(f"  {row['operation']:14}", *cells, f"{100 * row['share_of_allowed']:10.2f} %")
    memory = results["memory"]
    print(f"memory: plan {memory['plan_bytes'] / 2**30:.3f} GiB,", end=" ")
    print(f"measured {memory['measured_to_plan']:.4f} of it, tokens {memory['tokens_to_plan']:.4f}")
    print("checkpoint:", json.dumps(results["checkpoint"]))


def draw(results: dict, path: Path) -> None:
    """Draw and add by the number of stored questions, from the JSON alone."""
    sides = (("ours", "store", "#2a6f97"), ("plain", "plain Python, set", "#e09f3e"))
    sides += (("scan", "plain Python, list scan", "#9e2a2b"),)
    title = (
        f"store for {results['trajectories']} trajectories of {results['tokens']} tokens, "
        f"{results['device']} ({results['threads']} threads), torch {results['torch']}"
    )
    with panels(path, size=(10, 4), title=title, sharey=True) as axes:
        for axis, operation in zip(axes, ("draw", "add"), strict=True):
            rows = [(size["questions"], row) for size in results["by_size"] for row in size["rows"]]
            rows = [(questions, row) for questions, row in rows if row["operation"] == operation]
            for side, label, colour in sides:
                for value, style, name in (("ms", "o-", label), ("fastest_ms", ":", None)):
                    key = f"{side}_{value}"
                    points = [(questions, row[key]) for questions, row in rows if key in row]
                    if points:
                        axis.loglog(*zip(*points, strict=True), style, ms=4, c=colour, label=name)
            allowed = 1e3 * results["step_seconds"] * results["share_allowed"]
            axis.axhline(allowed, c="grey", lw=0.8, ls="--", label="1 % of a 1.5B step on 8 H100")
            axis.set(xlabel=f"stored questions ({operation})")
        axes[0].set_ylabel("ms: median, fastest dotted")
        axes[0].legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=45_000)
    parser.add_argument("--trajectories", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=1000, help="mean length of a trajectory")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--logprob-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--slow-repeats", type=int, default=3, help="list scan and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/experience.json")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments)))
        return
    results = measure(arguments)
    print_results(results)
    device = results["device"].lower().replace(" ", "-")
    path = arguments.out or Path(__file__).parent / "results" / device / "experience.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
