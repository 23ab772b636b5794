"""How does cost grow? CPU seconds of one piece of work, in one thread, over a decade of its size and more.

    python bench/growth.py [--repeats 5]

    tokens          the fused loss with its gradients, vocabulary 4,096, width 128
    vocabulary      the same, 512 tokens
    group size      the passes of an update on one question with so many completions of 64 tokens
    stored, asked   of a replay buffer with so many trajectories: draw 64 questions, read 1,024 trajectories
    stored, added   1,024 trajectories more
    ranks           the passes of an update on 32 completions by so many processes that talk by gloo: CPU
                    seconds of one of them

Sizes take turns, the fastest of the repeats counts: CPU seconds depend little on what else the machine
does, but not at all on nothing. `exponent` is the slope of log time over log size, by least squares: 1 is
linear, 0 is flat. Writes growth.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experience_sides import ASKED, EVERY, PER_STEP, Ours, Step, Workload
from loss import machine

from exgrpo_fast.build.assembly import make_learner, make_objective
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.config import validate
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes, joined, mesh_of
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.model.folder_reading import quiet_libraries
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.training.preflight import worst_groups
from exgrpo_kernels import linear_policy_loss

WIDTH, TOKENS_OF_A_COMPLETION, STORED_TOKENS = 128, 64, 64
SIZES = {
    "tokens": (512, 1024, 2048, 4096, 8192),
    "vocabulary": (2048, 4096, 8192, 16384, 32768, 65536),
    "group size": (4, 8, 16, 32, 64),
    "stored, asked": (4000, 8000, 16000, 32000, 64000),
    "stored, added": (4000, 8000, 16000, 32000, 64000),
    "ranks": (1, 2),
}


# ---- pieces of work ------------------------------------------------------------------------------


def loss_work(tokens: int, vocabulary: int) -> Callable[[], object]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = (torch.randn(vocabulary, WIDTH) / WIDTH**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    columns: dict[str, Any] = {
        "advantages": torch.randn(tokens),
        "behaviour_logprobs": torch.full((tokens,), -float(np.log(vocabulary))),
        "weights": torch.full((tokens,), 1.0 / tokens),
    }

    def work() -> None:
        hidden.grad = weight.grad = None
        linear_policy_loss(hidden, weight, targets, **columns).backward()

    return work


def group_work(group_size: int, processes: Processes = SINGLE_PROCESS) -> Callable[[], object]:
    """`processes`: over which the policy is sharded."""
    tokenizer = make_tokenizer(["What is 1 + 2? It is 3.\n"] * 3, vocab_size=512)
    config = validate(
        {
            "model": {"name": "made on the spot", "gradient_checkpointing": False},
            "data": {"max_prompt_tokens": 32},
            "rollout": {"max_completion_tokens": TOKENS_OF_A_COMPLETION},
            "train": {"max_tokens_per_microbatch": 1024},
        }
    )
    model: Any = make_model(tokenizer, seed=0, layers=2, width=WIDTH)
    vocabulary = len(model.get_output_embeddings().weight)
    limit: dict[str, Any] = {"max_tokens_per_microbatch": 1024}
    if processes.count == 1:
        policy = Policy(model, **limit)
    else:
        policy = ShardedPolicy(model, mesh=mesh_of(processes), processes=processes, **limit)
    learner = make_learner(config, policy, None)
    groups = worst_groups(
        1,
        group_size,
        prompt_tokens=32,
        completion_tokens=TOKENS_OF_A_COMPLETION,
        vocabulary=vocabulary,
    )
    objective = make_objective(config)
    return lambda: learner.rehearse(groups, objective)


def store_of(trajectories: int) -> tuple[Ours, Workload]:
    """A buffer with the trajectories of a workload, and room for some more."""
    workload = Workload(
        argparse.Namespace(
            questions=trajectories // 4,
            trajectories=trajectories,
            tokens=STORED_TOKENS,
            max_tokens=4 * STORED_TOKENS,
            logprob_dtype="float32",
            seed=0,
        )
    )
    plan = workload.plan()
    room = 64 * PER_STEP
    more = {
        "num_trajectories": plan.num_trajectories + room,
        "num_pages": plan.num_pages + 4 * room,
    }
    ours = Ours(type(plan)(**{**vars(plan), **more}), "cpu")
    for number in range(workload.num_steps):
        step = workload.step(number)
        ours.add(step)
        brought = list(dict.fromkeys(step.questions))
        ours.move(brought, workload.buckets[brought].tolist())
    return ours, workload


def ask_work(trajectories: int) -> Callable[[], object]:
    ours, workload = store_of(trajectories)
    rng = np.random.default_rng(0)
    rich = range(0, trajectories // 4 - 1, EVERY)
    asked = [rich[i * len(rich) // ASKED] for i in range(ASKED)]

    def work() -> None:
        ours.draw(rng)
        ours.gather(ours.rows(asked), workload.prompts)

    return work


def add_work(trajectories: int) -> Callable[[], object]:
    """Other trajectories each time, so that none is a copy."""
    ours, workload = store_of(trajectories)
    generator = torch.Generator().manual_seed(1)
    questions = torch.arange(PER_STEP) % len(workload.buckets)

    def work() -> None:
        tokens = torch.randint(150_000, (PER_STEP, STORED_TOKENS), generator=generator)
        logprobs = -torch.rand(PER_STEP, STORED_TOKENS, generator=generator)
        ours.add(Step(questions.tolist(), list(tokens), list(logprobs)))

    return work


def ranks_work(count: int) -> Callable[[], float]:
    """Returns its seconds itself: they pass in processes of their own."""

    def work() -> float:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
            store = f"file://{folder}/store"
            jobs = [(rank, count, store) for rank in range(count)]
            return max(pool.starmap(rank_seconds, jobs, chunksize=1))

    return work


def rank_seconds(rank: int, count: int, store: str) -> float:
    """The fastest of some updates, on one rank."""
    quiet_libraries()
    torch.set_num_threads(1)
    with joined(RankInfo(rank, count, rank), "cpu", store=store) as processes:
        work = group_work(32, processes)
        return min([cpu_seconds(work) for _ in range(6)][1:])


WORK: dict[str, Callable[[int], Callable[[], object]]] = {
    "tokens": lambda size: loss_work(size, 4096),
    "vocabulary": lambda size: loss_work(512, size),
    "group size": group_work,
    "stored, asked": ask_work,
    "stored, added": add_work,
    "ranks": ranks_work,
}


# ---- measuring -----------------------------------------------------------------------------------


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, or of another where `work` says them."""
    began = time.process_time()
    elsewhere = work()
    return elsewhere if isinstance(elsewhere, float) else time.process_time() - began


def measure(name: str, repeats: int) -> dict[str, Any]:
    works = {size: WORK[name](size) for size in SIZES[name]}
    fastest = dict.fromkeys(works, float("inf"))
    for number in range(repeats + 1):
        for size, work in works.items():
            spent = cpu_seconds(work)
            if number:  # the first round warms up
                fastest[size] = min(fastest[size], spent)
    sizes, seconds = list(fastest), list(fastest.values())
    return {
        "grows": name,
        "sizes": sizes,
        "cpu_seconds": [round(value, 5) for value in seconds],
        "exponent": round(exponent(sizes, seconds), 3),
    }


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "bench": "growth",
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "repeats": arguments.repeats,
        "rows": [],
    }
    for name in arguments.only:
        row = measure(name, arguments.repeats)
        results["rows"].append(row)
        print(row, flush=True)
    results["load_average"] = round(os.getloadavg()[0], 2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "growth.json"
    if set(arguments.only) != set(WORK) and path.exists():  # the other rows stay
        before = json.loads(path.read_text())
        kept = [row for row in before["rows"] if row["grows"] not in arguments.only]
        results["rows"] = sorted(
            [*kept, *results["rows"]], key=lambda row: list(WORK).index(row["grows"])
        )
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
