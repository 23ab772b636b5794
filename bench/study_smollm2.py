"""Does experience help a pretrained chat model? SmolLM2-135M on sums, paired by seed.

    python bench/study_smollm2.py --runs runs/study_smollm2 [--seeds 3] [--arms ...] [--jobs 1]
    python bench/study_smollm2.py --table          what is there

The recipe smollm2 with its keys changed as `ARMS` says; all arms share Dr.GRPO and the learning rate.
Where a stored trajectory takes the place of a completion fewer are generated, so an arm has its own
number of steps: each ends after about 1,440 to 1,480 generated completions. Revisions and
prior-guided completions count, and so does the run that makes EAPO's prior. A finished run is not
done again, and its record is written at once: bench/results/cpu/smollm2_study.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from study import bounds, fresh_completions, interval, save, steps_of, summary, train

from exgrpo_fast.run.metrics import METRICS


@dataclass(frozen=True)
class Arm:
    """Keys over the recipe smollm2, as the command takes them, and the steps of a run.

    `prior_steps`: so many steps of the recipe itself make the prior, from the same weights and seed.
    """

    options: str
    steps: int
    prior_steps: int = 0


BASELINE = "on-policy"
ARMS = {
    BASELINE: Arm("--replay.enabled false", 23),
    "questions only": Arm("--replay.mixer question_only", 23),
    "ExGRPO": Arm("", 24),
    # a buffer of 7.5 steps' rollouts, as in the recipe fifo
    "FIFO": Arm(
        "--replay.mixer fifo --replay.replay_ratio 1.78 --replay.keep all --replay.retire false "
        "--replay.weight clipped --replay.store.max_trajectories 480 --replay.store.evict oldest "
        "--replay.store.deduplicate false",
        23,
    ),
    "EAPO": Arm(
        "--replay.enabled false --prior_resampling.enabled true --prior_resampling.threshold 0.5 "
        "--prior_resampling.block_tokens 8",
        11,
        prior_steps=12,
    ),
    "HeRL": Arm(
        "--replay.enabled false --hindsight.enabled true --hindsight.max_prompt_tokens 256", 22
    ),
    "ExGRPO without shaping": Arm("--replay.weight importance", 24),
}
OUT = Path("bench/results/cpu/smollm2_study.json")
PER_STEP = {
    "pass_at_1": "pass_at_1_fresh",
    "entropy": "entropy_fresh",
    "completion_len": "completion_len_mean",
    "learnable_frac": "learnable_frac",
    "replay_frac": "replay_frac",
}


def run_arm(runs: Path, arm: str, seed: int) -> dict:
    """Train one run, after its prior where the arm has one; its record."""
    chosen = ARMS[arm]
    folder = runs / f"{arm.replace(' ', '_')}_{seed}"
    options = ["--train.seed", str(seed), "--max-steps", str(chosen.steps), *chosen.options.split()]
    prior = None
    if chosen.prior_steps:
        prior = runs / f"prior_{chosen.prior_steps}_{seed}"
        last = ["--train.seed", str(seed), "--max-steps", str(chosen.prior_steps)]
        train(prior, "smollm2", last)
        checkpoint = prior / f"checkpoints/step_{chosen.prior_steps}/hf"
        options += ["--prior_resampling.model", str(checkpoint)]
    train(folder, "smollm2", options)
    return record(folder, arm, seed, prior)


def record(folder: Path, arm: str, seed: int, prior: Path | None) -> dict:
    """Costs include the prior's; the curve is the run's own."""
    steps, found = steps_of(folder), summary(folder)
    paid = steps if prior is None else [*steps_of(prior), *steps]
    before, after = found["eval_before"], found["eval_after"]
    return {
        "arm": arm,
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "steps": len(steps),
        "fresh_completions": completions(paid),
        "tokens_generated": total(paid, "tokens_generated", "prior_tokens", "hindsight_tokens"),
        "tokens_trained": total(paid, "tokens_trained"),
        "before": before["avg_at_n"],
        "after": after["avg_at_n"],
        "after_interval": [after["avg_at_n_low"], after["avg_at_n_high"]],
        "completion_len_after": after["completion_len_mean"],
        "truncated_after": after["truncated"],
        "wall_seconds": found["wall_seconds"],
        "curve": {name: [step.get(key) for step in steps] for name, key in PER_STEP.items()},
    }


def completions(steps: Sequence[dict]) -> int:
    """Everything that was generated: fresh, guided by the prior, and revisions."""
    return sum(fresh_completions(steps)) + total(steps, "prior_completions", "hindsight_revisions")


def total(steps: Sequence[dict], *names: str) -> int:
    """The sum of these metrics over the steps; a name that no run writes is an error, not zero."""
    return sum(step.get(METRICS[name].name) or 0 for step in steps for name in names)


def table(runs: list[dict]) -> dict[str, dict]:
    """Held-out accuracy of each arm and its difference to on-policy, over the seeds it has."""
    after = {(run["arm"], run["seed"]): run["after"] for run in runs}
    rows = {}
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm]
        paired = [run["seed"] for run in mine if (BASELINE, run["seed"]) in after]
        if not paired:
            continue
        rows[arm] = {
            "after": interval([run["after"] for run in mine]),
            "minus_on_policy": interval([after[arm, s] - after[BASELINE, s] for s in paired]),
            "fresh_completions": statistics.fmean(run["fresh_completions"] for run in mine),
            "tokens_generated": statistics.fmean(run["tokens_generated"] for run in mine),
            "tokens_trained": statistics.fmean(run["tokens_trained"] for run in mine),
        }
    return rows


def write(path: Path, runs: list[dict]) -> None:
    """Arms in the order of `ARMS`, seeds ascending."""
    order = list(ARMS)
    runs = sorted(runs, key=lambda run: (order.index(run["arm"]), run["seed"]))
    save(path, {"recipe": "smollm2", "table": table(runs), "runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description="Does experience help a pretrained chat model?")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_smollm2"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print what is there")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    if arguments.table:
        print_table(table(runs))
        return
    done = {(run["arm"], run["seed"]) for run in runs}
    cells = itertools.product(arguments.arms, range(arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(run_arm, arguments.runs, *cell) for cell in cells if cell not in done]
        for job in as_completed(jobs):
            run = job.result()
            runs.append(run)
            write(arguments.out, runs)
            print(
                f"{run['arm']}, seed {run['seed']}: {run['before']:.3f} -> {run['after']:.3f}, "
                f"{run['fresh_completions']} completions",
                flush=True,
            )


def print_table(rows: dict[str, dict]) -> None:
    print(f"{'':24}{'seeds':>6}{'held out %':>12}{'- on-policy':>14}{'':18}{'completions':>12}")
    for arm, row in rows.items():
        minus = row["minus_on_policy"]
        print(
            f"{arm:24}{len(row['after']['values']):6}{100 * row['after']['mean']:12.1f}"
            f"{100 * minus['mean']:+14.1f}{bounds(minus):>18}{row['fresh_completions']:12,.0f}"
        )


if __name__ == "__main__":
    main()
