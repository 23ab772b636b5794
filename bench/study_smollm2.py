"""Does replay help a pretrained chat model? SmolLM2-135M on sums, three arms, paired by seed.

    python bench/study_smollm2.py --runs runs/study_smollm2 [--seeds 3]

The recipe smollm2 as it is (ExGRPO), with its replayed questions alone, and on-policy. Where a stored
trajectory takes the place of a completion fewer are generated, so ExGRPO gets one step more: each
arm ends after 1,444 to 1,472 fresh completions. Seed 0 of every arm comes first. A finished run is not
done again, and its record is written at once: bench/results/cpu/smollm2_study.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from pathlib import Path

from study import fresh_completions, interval, save, steps_of, summary, train

BASELINE = "on-policy"
ARMS = {
    BASELINE: ["--replay.enabled", "false", "--max-steps", "23"],
    "questions only": ["--replay.mixer", "question_only", "--max-steps", "23"],
    "ExGRPO": [],
}
OUT = Path("bench/results/cpu/smollm2_study.json")
PER_STEP = {
    "pass_at_1": "pass_at_1_fresh",
    "entropy": "entropy_fresh",
    "completion_len": "completion_len_mean",
    "learnable_frac": "learnable_frac",
    "replay_frac": "replay_frac",
}


def record(folder: Path, arm: str, seed: int) -> dict:
    steps, found = steps_of(folder), summary(folder)
    before, after = found["eval_before"], found["eval_after"]
    return {
        "arm": arm,
        "seed": seed,
        "steps": len(steps),
        "fresh_completions": sum(fresh_completions(steps)),
        "tokens_generated": sum(step["tokens_generated"] for step in steps),
        "tokens_trained": sum(step["tokens_trained"] for step in steps),
        "before": before["avg_at_n"],
        "after": after["avg_at_n"],
        "after_interval": [after["avg_at_n_low"], after["avg_at_n_high"]],
        "completion_len_after": after["completion_len_mean"],
        "truncated_after": after["truncated"],
        "wall_seconds": found["wall_seconds"],
        "curve": {name: [step.get(key) for step in steps] for name, key in PER_STEP.items()},
    }


def table(runs: list[dict]) -> dict[str, dict]:
    """Held-out accuracy of each arm and its difference to on-policy, over the seeds it has."""
    after = {(run["arm"], run["seed"]): run["after"] for run in runs}
    rows = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        paired = [run["seed"] for run in mine if (BASELINE, run["seed"]) in after]
        rows[arm] = {
            "after": interval([run["after"] for run in mine]),
            "minus_on_policy": interval([after[arm, s] - after[BASELINE, s] for s in paired]),
            "tokens_generated": statistics.fmean(run["tokens_generated"] for run in mine),
            "tokens_trained": statistics.fmean(run["tokens_trained"] for run in mine),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Does replay help a pretrained chat model?")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_smollm2"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = []
    for seed, arm in itertools.product(range(arguments.seeds), ARMS):
        folder = arguments.runs / f"{arm.replace(' ', '_')}_{seed}"
        train(folder, "smollm2", ["--train.seed", str(seed), *ARMS[arm]])
        runs.append(record(folder, arm, seed))
        save(OUT, {"recipe": "smollm2", "table": table(runs), "runs": runs})
        print(
            f"{arm}, seed {seed}: {runs[-1]['before']:.3f} -> {runs[-1]['after']:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
