"""How many steps does a prior save on the quickstart, and how much does that hang on tau and T?

    python bench/study_eapo.py --runs runs/study_eapo [--seeds 5] [--arms main|all] [--jobs 1]

For each seed: the warm start of `quickstart-eapo`, which knows how to show its steps and hardly ever
does; on-policy DAPO from it, whose last checkpoint is the prior; EAPO from the same warm start with
that prior. The figure of merit is the share of DAPO's steps in which EAPO reaches the held-out
accuracy at which DAPO ends. Held-out accuracy is measured every five steps, and lies on a straight
line between; a run that never gets there counts with all of its steps, so the mean is a lower bound
then. DAPO's own share says how much of that is the noise of its last steps. Beside it: the steps to
half of that accuracy, against DAPO's. Finished runs are not done again. Writes eapo_study.json and .png; training the prior
is not counted in the figure of merit, and stands beside it.
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
from study import bounds, interval, is_finished, save, steps_of, summary, train, warm_start

DAPO, EAPO = "on-policy DAPO", "EAPO"
MAIN: dict[str, list[str]] = {DAPO: ["--prior_resampling.enabled", "false"], EAPO: []}
SENSITIVITY: dict[str, list[str]] = {
    **{f"tau {tau}": ["--prior_resampling.threshold", tau] for tau in ("0.3", "0.8", "1.0")},
    **{f"T {last}": ["--prior_resampling.stop_after_steps", last] for last in ("10", "30", "50")},
    "without sIS": ["--prior_resampling.importance", "none"],
}
EVERY_ARM = MAIN | SENSITIVITY
EVERY, SAMPLES = 5, 4  # steps between evaluations; completions of each of 257 questions
OPTIONS = f"--reward.workers 1 --checkpoint.every 0 --eval.every {EVERY} --eval.n {SAMPLES} --eval.k [1,4]"


def result(folder: Path, arm: str, seed: int) -> dict:
    steps, found = steps_of(folder), summary(folder)
    curve = {0: found["eval_before"]["avg_at_n"]}
    curve |= {s["step"]: s["eval_avg_at_n"] for s in steps if "eval_avg_at_n" in s}
    curve[len(steps)] = found["eval_after"]["avg_at_n"]
    guided = [s for s in steps if "prior_completions" in s]
    return {
        "arm": arm,
        "seed": seed,
        "steps": len(steps),
        "after": found["eval_after"]["avg_at_n"],
        "curve": {"step": list(curve), "held_out": list(curve.values())},
        "fresh_pass_at_1": [s["pass_at_1_fresh"] for s in steps],
        "wall_seconds": found["wall_seconds"],
        "guided": {
            name: [s[f"prior_{name}"] for s in guided]
            for name in ("redrawn_frac", "pass_at_1", "groups_mixed", "kl", "waste")
        },
    }


def steps_to_reach(curve: dict, target: float) -> float | None:
    """The first step, on straight lines between evaluations, at which the target is reached."""
    points = list(zip(curve["step"], curve["held_out"], strict=True))
    for (step, low), (later, high) in itertools.pairwise(points):
        if high >= target:
            return step + (later - step) * max(target - low, 0.0) / (high - low)
    return None


def compare(runs: list[dict]) -> dict:
    by_key = {(run["arm"], run["seed"]): run for run in runs}
    table = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        shares, halves, late = [], [], 0
        for run in mine:
            dapo = by_key[DAPO, run["seed"]]
            reached = steps_to_reach(run["curve"], dapo["after"])
            late += reached is None
            shares.append((run["steps"] if reached is None else reached) / dapo["steps"])
            half = [steps_to_reach(r["curve"], dapo["after"] / 2) for r in (run, dapo)]
            halves.append((half[0] or run["steps"]) / (half[1] or dapo["steps"]))
        gaps = [run["after"] - by_key[DAPO, run["seed"]]["after"] for run in mine]
        table[arm] = {
            "seeds": [run["seed"] for run in mine],
            "after": interval([run["after"] for run in mine]),
            "minus_dapo": interval(gaps),
            "share_of_steps": interval(shares),
            "share_of_steps_to_half": interval(halves),
            "not_reached": late,
        }
    return table


def print_table(table: dict) -> None:
    print(
        f"{'':16}{'seeds':>6}{'avg@4 %':>9}{'':>15}{'minus DAPO':>12}{'steps %':>9}{'':>16}{'late':>5}"
    )
    for arm, row in table.items():
        after, share = row["after"], row["share_of_steps"]
        print(
            f"{arm:16}{len(row['seeds']):6}{100 * after['mean']:9.1f}{bounds(after):>15}"
            f"{100 * row['minus_dapo']['mean']:+12.1f}{100 * share['mean']:9.1f}"
            f"{bounds(share):>16}{row['not_reached']:5}"
        )


def plot(results: dict, left: Any, right: Any) -> None:
    """Held-out accuracy over steps, mean over seeds; and the share of steps by arm."""
    for colour, arm in enumerate((DAPO, EAPO)):
        curves = [run["curve"] for run in results["runs"] if run["arm"] == arm]
        for curve in curves:
            values = [100 * v for v in curve["held_out"]]
            left.plot(curve["step"], values, color=f"C{colour}", alpha=0.25, lw=0.8)
        steps = curves[0]["step"]
        means = [
            100 * statistics.fmean(c["held_out"][i] for c in curves) for i in range(len(steps))
        ]
        left.plot(steps, means, color=f"C{colour}", lw=2, label=arm)
    left.set_xlabel("steps")
    left.set_ylabel(f"held-out avg@{SAMPLES}, %")
    left.legend(frameon=False)
    arms = [arm for arm in results["table"] if arm != DAPO]
    for place, arm in enumerate(arms):
        row = results["table"][arm]["share_of_steps"]
        right.plot([place] * len(row["values"]), [100 * v for v in row["values"]], "o", alpha=0.45)
        right.plot(place, 100 * row["mean"], "k_", ms=14)
    right.axhline(70, color="grey", lw=0.8, ls="--")
    right.set_xticks(range(len(arms)), arms, rotation=20, ha="right")
    right.set_ylabel("steps to DAPO's final accuracy, % of its steps")


def main() -> None:
    parser = argparse.ArgumentParser(description="EAPO against on-policy DAPO over seeds.")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_eapo"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sensitivity-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--arms", choices=["main", "all"], default="all")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--only-finished", action="store_true", help="evaluate what is there")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/eapo_study.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the same arithmetic, however many run side by side

    def folder_of(seed: int, arm: str) -> Path:
        return arguments.runs / f"seed{seed}" / arm.replace(" ", "_")

    def run(job: tuple[int, str]) -> dict | None:
        seed, arm = job
        start, folder = arguments.runs / f"seed{seed}" / "warm_start", folder_of(seed, arm)
        options = [*OPTIONS.split(), "--max-steps", str(arguments.steps)]
        options += ["--train.seed", str(seed), "--model.name", str(start), *EVERY_ARM[arm]]
        if arm != DAPO:
            prior = folder_of(seed, DAPO) / f"checkpoints/step_{arguments.steps}/hf"
            options += ["--prior_resampling.model", str(prior)]
        if not arguments.only_finished:
            train(folder, "quickstart-eapo", options)
        return result(folder, arm, seed) if is_finished(folder) else None

    seeds = range(arguments.seeds)
    if not arguments.only_finished:
        for seed in seeds:
            warm_start("quickstart-eapo", arguments.runs / f"seed{seed}" / "warm_start", seed)
    runs: list[dict | None] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for arm in MAIN:  # the prior of every seed before anything is guided by it
            runs += pool.map(run, [(seed, arm) for seed in seeds])
        if arguments.arms == "all":
            few = range(min(arguments.seeds, arguments.sensitivity_seeds))
            runs += pool.map(run, itertools.product(few, SENSITIVITY))
    finished = [found for found in runs if found is not None]
    results = {
        "steps": arguments.steps,
        "questions_per_step": 32,
        "group_size": 8,
        "table": compare(finished),
        "runs": finished,
    }
    print_table(results["table"])
    record = save(arguments.out, results)
    title = f"quickstart-eapo, {record['device']}, {record['date']}"
    with panels(arguments.out.with_suffix(".png"), size=(12, 4.5), title=title) as axes:
        plot(record, *axes)


if __name__ == "__main__":
    main()
