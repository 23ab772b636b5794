"""What does replay gain on the quickstart, and which part of it? An ablation over seeds.

    python bench/study_replay.py --runs runs/study_replay [--seeds 5] [--jobs 2]

Six arms from the same warm start of each seed. Those that replay generate K - 1 fresh completions
for half of their questions, so the others get fewer steps: every arm ends after about the same
number of fresh completions. Finished runs are not done again. Writes replay_study.json and .png:
held-out avg@8 of every run, means with 95 % intervals over seeds, and differences to on-policy
paired by seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import panels
from study import (
    bounds,
    fresh_completions,
    interval,
    save,
    steps_of,
    summary,
    train,
    warm_start,
)

ARMS = {
    "on-policy": ["--replay.enabled", "false"],
    "questions only": ["--replay.mixer", "question_only"],
    "ExGRPO": [],
    "without shaping": ["--replay.weight", "importance"],
    "highest entropy": ["--replay.select", "highest_entropy"],
    "random trajectory": ["--replay.select", "random"],
}
ALL_FRESH = {"on-policy", "questions only"}
BASELINE = "on-policy"
# 64 questions x 8; where half of the questions bring a stored one, 32 x 8 + 32 x 7
FRESH_PER_STEP, FRESH_BESIDE_REPLAY = 512, 480


def num_steps(arm: str, replay_steps: int) -> int:
    """Steps after which an arm has generated what `replay_steps` of a replaying one do."""
    if arm not in ALL_FRESH:
        return replay_steps
    return round(replay_steps * FRESH_BESIDE_REPLAY / FRESH_PER_STEP)


def result(folder: Path, arm: str, seed: int) -> dict:
    steps, found = steps_of(folder), summary(folder)
    fresh = list(itertools.accumulate(fresh_completions(steps)))
    last = steps[-10:]
    return {
        "arm": arm,
        "seed": seed,
        "steps": len(steps),
        "fresh_completions": fresh[-1],
        "before": found["eval_before"]["avg_at_n"],
        "after": found["eval_after"]["avg_at_n"],
        "after_interval": [found["eval_after"][f"avg_at_n_{end}"] for end in ("low", "high")],
        "pass_at_8": found["eval_after"]["pass_at_k"]["8"],
        "entropy_last_10": statistics.fmean(s["entropy_fresh"] for s in last),
        "replay_frac_last_10": statistics.fmean(s["replay_frac"] for s in last),
        "wall_seconds": found["wall_seconds"],
        "curve": {"fresh": fresh, "pass_at_1": [s["pass_at_1_fresh"] for s in steps]},
    }


def compare(runs: list[dict]) -> dict:
    after = {(run["arm"], run["seed"]): run["after"] for run in runs}
    table = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        seeds = [run["seed"] for run in runs if run["arm"] == arm]
        paired = [s for s in seeds if (BASELINE, s) in after]
        table[arm] = {
            "avg_at_8": interval([after[arm, s] for s in seeds]),
            "minus_on_policy": interval([after[arm, s] - after[BASELINE, s] for s in paired]),
            "pass_at_8": statistics.fmean(r["pass_at_8"] for r in runs if r["arm"] == arm),
            "entropy": statistics.fmean(r["entropy_last_10"] for r in runs if r["arm"] == arm),
            "fresh_completions": statistics.fmean(
                r["fresh_completions"] for r in runs if r["arm"] == arm
            ),
        }
    return table


def print_table(table: dict) -> None:
    print(f"{'':20}{'avg@8 %':>9}{'95 % interval':>17}{'minus on-policy':>17}{'':>17}{'fresh':>8}")
    for arm, row in table.items():
        mine, gap = row["avg_at_8"], row["minus_on_policy"]
        print(
            f"{arm:20}{100 * mine['mean']:9.1f}{bounds(mine):>17}{100 * gap['mean']:+17.1f}"
            f"{bounds(gap):>17}{row['fresh_completions']:8.0f}"
        )


def plot(results: dict, left: Any, right: Any) -> None:
    """Held-out accuracy by arm and seed, and fresh accuracy over fresh completions."""
    arms = list(results["table"])
    for place, arm in enumerate(arms):
        row = results["table"][arm]["avg_at_8"]
        values = [100 * v for v in row["values"]]
        left.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.45, ms=5)
        if row["low"] is not None:
            ends = [[100 * (row["mean"] - row["low"])], [100 * (row["high"] - row["mean"])]]
            left.errorbar(place, 100 * row["mean"], ends, color="k", fmt="_", ms=14, capsize=4)
        curves = [run["curve"] for run in results["runs"] if run["arm"] == arm]
        length = min(len(curve["fresh"]) for curve in curves)
        xs = [statistics.fmean(c["fresh"][i] for c in curves) for i in range(length)]
        ys = [100 * statistics.fmean(c["pass_at_1"][i] for c in curves) for i in range(length)]
        right.plot(xs, ys, color=f"C{place}", label=arm, lw=1.3)
    left.set_xticks(range(len(arms)), arms, rotation=20, ha="right")
    left.set_ylabel("held-out avg@8, %")
    left.set_title("each seed, mean and 95 % interval", fontsize=10)
    right.set_xlabel("fresh completions generated")
    right.set_ylabel("pass@1 of fresh completions, %")
    right.set_title("mean over seeds; re-asked questions are of medium difficulty", fontsize=10)
    right.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description="An ablation of replay over seeds.")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_replay"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48, help="of the arms that replay")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/replay_study.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the same arithmetic, however many run side by side
    seeds = range(arguments.seeds)
    starts = {seed: arguments.runs / f"seed{seed}" / "warm_start" for seed in seeds}

    def run(job: tuple[int, str]) -> dict:
        seed, arm = job
        folder = arguments.runs / f"seed{seed}" / arm.replace(" ", "_")
        steps = num_steps(arm, arguments.steps)
        options = f"--max-steps {steps} --train.seed {seed} --eval.every 0 --checkpoint.every 0"
        start = ["--model.name", str(starts[seed])]
        train(folder, "quickstart", [*options.split(), *start, *ARMS[arm]])
        return result(folder, arm, seed)

    for seed, start in starts.items():
        warm_start("quickstart", start, seed)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(run, itertools.product(seeds, ARMS)))
    results = {
        "seeds": arguments.seeds,
        "replay_steps": arguments.steps,
        "table": compare(runs),
        "runs": runs,
    }
    print_table(results["table"])
    record = save(arguments.out, results)
    title = (
        f"quickstart, {record['seeds']} seeds, {record['replay_steps']} steps, "
        f"{record['device']}, {record['date']}"
    )
    with panels(arguments.out.with_suffix(".png"), size=(12, 4.5), title=title) as axes:
        plot(record, *axes)


if __name__ == "__main__":
    main()
