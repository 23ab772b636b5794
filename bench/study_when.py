"""When does experience pay? Starting success rate x method x seeds, on small sums.

    python bench/study_when.py --runs runs/study_when [--seeds 5]
    python bench/study_when.py --table          the table of what is there, and the figure

The policy (2 layers, width 96) learns to show the steps of a sum; a copy of it then learns to name a
wrong number instead. The starts lie on the straight line between the weights of the two, where about
1, 3, 10, 25, 50 % of the training questions are solved.
From each of these starts every method trains until it has generated the same number of completions
(BUDGETS): revisions and prior-guided completions count, and EAPO begins with half of the budget spent, for its
prior is the on-policy run of the same seed at that point. All methods share Dr.GRPO, learning rate
and step size. HeRL alone is rewarded by rubrics; held-out accuracy is the exact answer for all.

Each finished run is one record of the JSON, written at once; what is recorded is not done again.
Seed 0 of every cell comes first, then seed 1, ... A record holds held-out accuracy along the run with
completions, tokens generated, tokens trained and CPU seconds of the trainer's process (evaluation
left out), so that methods can be compared at equal completions and at equal compute.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study import bounds, interval

from exgrpo_fast.build.assembly import make_trainer
from exgrpo_fast.build.data import load_data
from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.experience import make_prior
from exgrpo_fast.build.models import make_evaluator, make_policy, make_verifier
from exgrpo_fast.build.quickstart.prepare import imitated_pairs, tokenize_examples, warm_start
from exgrpo_fast.build.quickstart.solutions import answer
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.build.rewards import make_rewards
from exgrpo_fast.config import Config, GymTask, load_config
from exgrpo_fast.core.rng import seed_everything
from exgrpo_fast.core.types import Question
from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.sinks import MetricSink
from exgrpo_fast.training.evaluate import Evaluator
from exgrpo_fast.training.trainer import Trainer

OUT = Path("bench/results/cpu/when_experience_pays.json")
RATES = (0.01, 0.03, 0.10, 0.25, 0.50)
BASELINE = "on-policy"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {"replay.enabled": False},
    "questions only": {"replay.mixer": "question_only"},
    "ExGRPO": {},
    "ExGRPO without shaping": {"replay.weight": "importance"},
    "FIFO": {
        "replay.mixer": "fifo",
        "replay.replay_ratio": 1.78,
        "replay.start_success_rate": None,
        "replay.keep": "all",
        "replay.retire": False,
        "replay.weight": "clipped",
        "replay.store": {"max_trajectories": 960, "evict": "oldest", "deduplicate": False},
    },
    "EAPO": {
        "replay.enabled": False,
        "prior_resampling.enabled": True,
        "prior_resampling.threshold": 0.5,
        "prior_resampling.block_tokens": 8,
    },
    "HeRL": {
        "replay.enabled": False,
        "reward.functions": ["sums_rubrics"],
        "hindsight.enabled": True,
        "hindsight.max_prompt_tokens": 320,
    },
}
# Why ExGRPO ends where it does: without its start rule, and then without what it replays.
FROM_STEP_1 = {"replay.start_success_rate": None}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ExGRPO from step 1": FROM_STEP_1,
    "questions only from step 1": {**FROM_STEP_1, "replay.mixer": "question_only"},
}
ABLATION_RATES = (0.01, 0.03, 0.10)
# And which of its choices that makes: one changed at a time.
CHOICES: dict[str, dict[str, Any]] = {
    "ExGRPO, sigma 1 (as printed)": {"replay.bucket_sigma": 1.0},
    "ExGRPO without retirement": {"replay.retire": False},
    "ExGRPO, at most 10 steps old": {"replay.max_age": 10},
    "ExGRPO, highest entropy": {"replay.select": "highest_entropy"},
}
CHOICE_RATES = (0.03, 0.10, 0.25)
# A replayed token of ratio 1 weighs beta / (1 + beta)^2 of a fresh one: 0.083 with the published beta
# of 0.1, 0.019 with 0.02, at most 0.25 (with 1), and 1 without shaping. Duplicates: a completion that
# a question has brought already is stored again, or a question keeps a single one.
WEIGHTS_AND_DUPLICATES: dict[str, dict[str, Any]] = {
    "ExGRPO, shaping 0.02": {"replay.shaping": 0.02},
    "ExGRPO, shaping 1": {"replay.shaping": 1.0},
    "ExGRPO, duplicates stored": {"replay.store": {"deduplicate": False}},
    "ExGRPO, one stored a question": {"replay.store": {"max_per_question": 1}},
}
EXAMINED: dict[str, tuple[str, ...]] = {
    "start rule": ("ExGRPO from step 1",),
    "bucket width": ("ExGRPO, sigma 1 (as printed)",),
    "retirement": ("ExGRPO without retirement",),
    "shaping factor": ("ExGRPO, shaping 0.02", "ExGRPO, shaping 1", "ExGRPO without shaping"),
    "duplicates": ("ExGRPO, duplicates stored", "ExGRPO, one stored a question"),
    "staleness": ("ExGRPO, at most 10 steps old",),
    "choice of trajectory": ("ExGRPO, highest entropy",),
}
# The same keys once more with the code of the changed runs: a version that rounds its sums otherwise
# gives another run of the same seed, so pairs need one version. Each changed run of `CHOICES` and
# `WEIGHTS_AND_DUPLICATES` in the corner is compared with its own.
AGAIN: dict[str, dict[str, Any]] = {
    f"{arm} again": keys
    for arm, keys in {
        BASELINE: ARMS[BASELINE],
        "ExGRPO": {},
        "ExGRPO from step 1": FROM_STEP_1,
    }.items()
}
# The same changes where ExGRPO loses most: replay from step 1 in the corner.
LOSING = "ExGRPO from step 1"


def from_step_1(arm: str) -> str:
    return arm.replace("ExGRPO", LOSING, 1)


LOSING_CHOICES: dict[str, dict[str, Any]] = {
    from_step_1(arm): {**(ARMS | CHOICES)[arm], **FROM_STEP_1}
    for arm in ("ExGRPO, sigma 1 (as printed)", "ExGRPO without shaping")
}
# As many completions a step in groups of another size, where few groups carry a gradient.
CORNER = 0.03
GROUP_SIZES: dict[str, dict[str, Any]] = {
    f"{arm}, groups of {size}": {
        **keys,
        "rollout.group_size": size,
        "rollout.prompts_per_step": 128 // size,
    }
    for size in (4, 16)
    for arm, keys in ((BASELINE, ARMS[BASELINE]), ("ExGRPO from step 1", FROM_STEP_1))
}
TOY = {
    "train.lr": 1e-4,
    "train.max_steps": 200,
    "train.max_tokens_per_microbatch": 8192,
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 8,
    "rollout.max_completion_tokens": 40,
    "reward.functions": ["exact"],  # reasoning_gym gives a wrong 86 half a point where 8 is right
    "reward.workers": 1,
}
# Which arms run from which starts.
ARMS_AT: list[tuple[dict[str, dict[str, Any]], tuple[float, ...]]] = [
    (ARMS, RATES),
    (ABLATIONS, ABLATION_RATES),
    (CHOICES, CHOICE_RATES),
    (WEIGHTS_AND_DUPLICATES, (CORNER,)),
    (LOSING_CHOICES, (CORNER,)),
    (AGAIN, (CORNER,)),
    (GROUP_SIZES, (CORNER,)),
]
EVERY_ARM = {arm: keys for arms, _ in ARMS_AT for arm, keys in arms.items()}
# Completions of a run: four times as many where no method moves in the first 4,096.
BUDGETS = {0.01: 16_384, 0.03: 16_384, 0.10: 4096, 0.25: 4096, 0.50: 4096}
POINTS = 4  # held-out evaluations along a run, the last one with all questions and 8 completions
FEW_QUESTIONS, FEW_COMPLETIONS = 64, 4
QUESTIONS, COMPLETIONS = 128, 8
BASE_BATCHES, GUESS_BATCHES = 1200, 80
NEVER_CORRECT = (30, 100)  # no sum of three digits lies there
COLLAPSE = 0.10  # a run whose end lies so far below the best point of its curve


# --- the starting policies ------------------------------------------------------------------------


class Workshop:
    """Tokenizer, questions, reward workers and starting policies, made once for all runs."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        config = self.config({}, seed=0)
        texts = [f"{q}\n{s}" for q, s in imitated_pairs(config, task_of(config))[:2000]]
        self.tokenizer: Tokenizer = make_tokenizer(texts)
        self.train, held_out = load_data(config, self.tokenizer, Screen())
        self.held_out = held_out[:QUESTIONS]
        self.pools: dict[str, RewardPool] = {}
        self.before: dict[Path, float] = {}  # held-out accuracy of the starts

    def config(self, keys: dict[str, Any], *, seed: int) -> Config:
        values = {**TOY, "train.seed": seed, **keys}
        return load_config("quickstart", [(k, json.dumps(v)) for k, v in values.items()])

    def rewards(self, config: Config) -> RewardPool:
        name = config.reward.functions[0]
        if name not in self.pools:
            self.pools[name] = make_rewards(config)
        return self.pools[name]

    def start(self, seed: int, rate: float) -> Path:
        """The folder of a policy that solves about `rate` of the training questions."""
        folder = self.runs / f"seed{seed}" / f"start_{rate:g}"
        if not folder.exists():
            self._make_start(seed, rate, folder)
        return folder

    def _make_start(self, seed: int, rate: float, folder: Path) -> None:
        config = self.config({}, seed=seed)
        policy = self._new_policy(config, seed)
        steps, guesses = self._ends(config, policy, seed)
        engine = make_transformers_engine(config, policy, self.tokenizer)
        evaluator = self.evaluator(config, engine, completions=FEW_COMPLETIONS)
        low, high = 0.0, 1.0
        for _ in range(8):
            share = (low + high) / 2
            policy.model.load_state_dict(
                {name: torch.lerp(steps[name], guesses[name], share) for name in steps}
            )
            found = evaluator(self.train[:QUESTIONS]).avg_at_n
            low, high = (share, high) if found > rate else (low, share)
            if abs(found - rate) < 0.1 * rate:
                break
        print(f"seed {seed}: {found:.3f} at {share:.3f} of the way", flush=True)
        policy.model.save_pretrained(folder)

    def _new_policy(self, config: Config, seed: int) -> Policy:
        return Policy(
            make_model(self.tokenizer, seed=seed, layers=2, width=96),
            max_tokens_per_microbatch=config.microbatch_tokens,
        )

    def _ends(
        self, config: Config, policy: Policy, seed: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights that show their steps, and weights that guess; made once for a seed."""
        path = self.runs / f"seed{seed}" / "ends.pt"
        if not path.exists():
            learn = functools.partial(warm_start, policy, batch_size=40, seed=seed, screen=Screen())
            pairs = imitated_pairs(config, task_of(config), guess_share=0.0)
            learn(tokenize_examples(pairs, self.tokenizer), batches=BASE_BATCHES, lr=3e-3)
            steps = {name: value.clone() for name, value in policy.model.state_dict().items()}
            rng = np.random.default_rng(seed)
            wrong = [(q, answer(rng.integers(*NEVER_CORRECT))) for q, _ in pairs[:4000]]
            learn(tokenize_examples(wrong, self.tokenizer), batches=GUESS_BATCHES, lr=1e-3)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save([steps, dict(policy.model.state_dict())], path)
        return tuple(torch.load(path, weights_only=True))

    def evaluator(self, config: Config, engine: Any, *, completions: int) -> Evaluator:
        """Exact answers, whatever a run is rewarded for."""
        config = config.model_copy(
            update={
                "reward": config.reward.model_copy(update={"functions": ["exact"]}),
                "eval": config.eval.model_copy(update={"n": completions, "k": [1, completions]}),
            }
        )
        verifier = make_verifier(config, self.rewards(config), self.tokenizer, Screen())
        return make_evaluator(config, engine, verifier, Screen())


def task_of(config: Config) -> GymTask:
    task = config.data.train
    assert isinstance(task, GymTask), task
    return task


# --- one run --------------------------------------------------------------------------------------


def run_cell(shop: Workshop, arm: str, rate: float, seed: int, runs: list[dict]) -> dict:
    """Train one policy for the budget; its record."""
    cell = shop.runs / f"seed{seed}"
    budget = BUDGETS[rate]
    keys = {**EVERY_ARM[arm], "model.name": str(shop.start(seed, rate))}
    names = ("completions", "tokens_generated", "tokens_trained", "cpu_seconds")
    spent: dict[str, float] = dict.fromkeys(names, 0.0)
    halfway = cell / f"halfway_{rate:g}"
    if arm == "EAPO":
        keys["prior_resampling.model"] = str(halfway)
        baseline = next(r for r in runs if key_of(r) == (rate, BASELINE, seed))
        spent = dict(baseline["at_half"])
    config = shop.config(keys, seed=seed)
    seed_everything(seed)
    policy = make_policy(config, str(shop.start(seed, rate)), device="cpu")
    engine = make_transformers_engine(config, policy, shop.tokenizer)
    few, full = (
        shop.evaluator(config, engine, completions=n) for n in (FEW_COMPLETIONS, COMPLETIONS)
    )
    few_questions = shop.held_out[:FEW_QUESTIONS]
    folder = shop.start(seed, rate)
    if folder not in shop.before:
        shop.before[folder] = full(shop.held_out).avg_at_n
    start = shop.before[folder]
    curve = [{**spent, "held_out": start}]
    marks = [budget * (i + 1) / POINTS for i in range(POINTS - 1)]
    marks = [mark for mark in marks if mark > spent["completions"]]
    steps, at_half = [], None
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(shop, config, policy, engine, Path(folder) / "run")
        while spent["completions"] < budget:
            before = time.process_time()
            batch, metrics = trainer.step()
            spent["cpu_seconds"] += time.process_time() - before
            add_costs(spent, batch, metrics)
            steps.append({name: metrics[name] for name in ("entropy_fresh", "learnable_frac", "pass_at_1_fresh", "replay_frac")})  # fmt: skip
            if marks and spent["completions"] >= marks[0]:
                marks.pop(0)
                curve.append({**spent, "held_out": few(few_questions).avg_at_n})
            if arm == BASELINE and at_half is None and spent["completions"] >= budget / 2:
                at_half = dict(spent)
                policy.model.save_pretrained(halfway)
    end = full(shop.held_out)
    curve.append({**spent, "held_out": end.avg_at_n})
    return {
        "rate": rate,
        "arm": arm,
        "seed": seed,
        "start": start,
        "end": end.avg_at_n,
        "pass_at_8": end.pass_at_k["8"],
        "entropy": statistics.fmean(s["entropy_fresh"] for s in steps[-5:]),
        "without_gradient": 1 - statistics.fmean(s["learnable_frac"] for s in steps[:5]),
        "replay_frac": statistics.fmean(s["replay_frac"] for s in steps),
        "replay_from": next((i + 1 for i, s in enumerate(steps) if s["replay_frac"] > 0), None),
        "steps": len(steps),
        "at_half": at_half,
        "curve": curve,
        "pass_at_1": [round(s["pass_at_1_fresh"], 4) for s in steps],
    }


def trainer_of(
    shop: Workshop, config: Config, policy: Policy, engine: Any, folder: Path
) -> Trainer:
    train: list[Question] = shop.train
    return make_trainer(
        config,
        policy=policy,
        reference=None,
        engine=engine,
        rewards=shop.rewards(config),
        train=train,
        held_out=shop.held_out,
        tokenizer=shop.tokenizer,
        folder=RunFolder(folder, resume=False),
        screen=Screen(),
        sink=MetricSink(),
        prior=make_prior(config, policy, shop.tokenizer, engine, None),
    )


def add_costs(spent: dict[str, float], batch: Any, metrics: dict[str, Any]) -> None:
    """Everything that an engine generated, and every completion token that was trained."""
    drawn = sum(t.source in ("fresh", "prior") for g in batch.generated for t in g.trajectories)
    spent["completions"] += drawn + metrics.get("hindsight_revisions", 0)
    spent["tokens_generated"] += sum(
        metrics.get(name) or 0 for name in ("tokens_generated", "hindsight_tokens", "prior_tokens")
    )
    spent["tokens_trained"] += metrics["tokens_trained"]


# --- the order, and the record --------------------------------------------------------------------


def key_of(run: dict) -> tuple[float, str, int]:
    return run["rate"], run["arm"], run["seed"]


def cells(seeds: int) -> Iterator[tuple[float, str, int]]:
    """The baseline of a rate before the others, since EAPO's prior comes from it."""
    for seed in range(seeds):
        for rate in (0.03, 0.10, 0.01, 0.25, 0.50):
            for arm in arms_of(rate):
                yield rate, arm, seed


def arms_of(rate: float) -> list[str]:
    return [arm for arms, rates in ARMS_AT if rate in rates for arm in arms]


def load_runs(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"] if path.exists() else []


def save(path: Path, runs: list[dict]) -> None:
    """In place of the old file at once, so that a kill leaves one of the two."""
    results = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu ({platform.machine()}), 1 thread",
        "torch": torch.__version__,
        "budgets": {str(rate): budget for rate, budget in BUDGETS.items()},
        "corner": CORNER,
        "toy": TOY,
        "table": table_of(runs),
        "choices": choice_rows(runs),
        "again": again_rows(runs),
        "runs": [],
    }
    a_run_a_line = ",\n  ".join(map(json.dumps, runs))
    text = json.dumps(results, indent=1).replace('"runs": []', f'"runs": [\n  {a_run_a_line}\n ]')
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --- what the runs say ----------------------------------------------------------------------------


def compute(point: dict[str, float]) -> float:
    """Tokens generated and tokens trained."""
    return point["tokens_generated"] + point["tokens_trained"]


def held_out_at(run: dict, tokens: float) -> float:
    """Held-out accuracy at a number of tokens, on straight lines between evaluations; EAPO's curve
    begins where its prior is paid for, and lies at its start before that."""
    points = run["curve"]
    if tokens <= compute(points[0]):
        return points[0]["held_out"]
    for before, after in itertools.pairwise(points):
        if tokens <= compute(after):
            share = (tokens - compute(before)) / (compute(after) - compute(before))
            return before["held_out"] + share * (after["held_out"] - before["held_out"])
    return points[-1]["held_out"]


def completions(point: dict[str, float]) -> float:
    return point["completions"]


def reached(
    run: dict, target: float, cost: Callable[[dict[str, float]], float] = completions
) -> float | None:
    """What it cost until the curve crosses a held-out accuracy; None where it never does."""
    for before, after in itertools.pairwise(run["curve"]):
        if after["held_out"] >= target > before["held_out"]:
            share = (target - before["held_out"]) / (after["held_out"] - before["held_out"])
            return cost(before) + share * (cost(after) - cost(before))
    return None


def tokens_to_match(run: dict, base: dict) -> float | None:
    """Tokens to get nine tenths of what the baseline gains, as a share of the baseline's own."""
    best = max(point["held_out"] for point in base["curve"])
    target = base["start"] + 0.9 * (best - base["start"])
    own, theirs = reached(run, target, compute), reached(base, target, compute)
    return own / theirs if own and theirs else None


def is_collapsed(run: dict) -> bool:
    return run["end"] < max(point["held_out"] for point in run["curve"]) - COLLAPSE


def table_of(runs: list[dict]) -> list[dict]:
    """One row a cell, over the seeds that it has; differences are paired by seed."""
    by_key = {key_of(run): run for run in runs}
    rows = []
    for rate, arm in itertools.product(RATES, EVERY_ARM):
        mine = [run for run in runs if key_of(run)[:2] == (rate, arm)]
        paired = [(r, b) for r in mine if (b := by_key.get((rate, BASELINE, r["seed"])))]
        if not paired:
            continue
        at_equal_tokens = []
        for run, base in paired:
            tokens = min(compute(run["curve"][-1]), compute(base["curve"][-1]))
            at_equal_tokens.append(held_out_at(run, tokens) - held_out_at(base, tokens))
        halfway = [reached(run, (1 + run["start"]) / 2) for run in mine]
        found = [cost for cost in halfway if cost is not None]
        matched = [cost for pair in paired if (cost := tokens_to_match(*pair)) is not None]
        rows.append(
            {
                "rate": rate,
                "arm": arm,
                "is_choice": arm in CHOICES | WEIGHTS_AND_DUPLICATES | LOSING_CHOICES | AGAIN,
                "seeds": len(mine),
                "start": statistics.fmean(run["start"] for run in mine),
                "without_gradient": statistics.fmean(run["without_gradient"] for run in mine),
                "end": interval([run["end"] for run in mine]),
                "minus_on_policy": interval([run["end"] - base["end"] for run, base in paired]),
                "minus_on_policy_at_equal_tokens": interval(at_equal_tokens),
                "tokens": statistics.fmean(compute(run["curve"][-1]) for run in mine),
                "cpu_seconds": statistics.fmean(r["curve"][-1]["cpu_seconds"] for r in mine),
                "completions_to_halfway": statistics.median(found) if found else None,
                "reached_halfway": len(found),
                "tokens_to_match": statistics.median(matched) if matched else None,
                "matched": len(matched),
                "pass_at_8": statistics.fmean(run["pass_at_8"] for run in mine),
                "entropy": statistics.fmean(run["entropy"] for run in mine),
                "collapsed": sum(map(is_collapsed, mine)),
            }
        )
    return rows


def choice_rows(runs: list[dict]) -> list[dict]:
    """What each choice of ExGRPO makes: the run with it changed minus ExGRPO, paired by seed where
    both began with the same weights, and in the corner with runs of the same version."""
    rows = []
    for examined, arms in EXAMINED.items():
        for arm in arms:
            later = arm in CHOICES | WEIGHTS_AND_DUPLICATES
            found = {
                str(rate): gap(
                    runs, rate, arm, "ExGRPO again" if later and rate == CORNER else "ExGRPO"
                )
                for rate in CHOICE_RATES
            }
            rows.append(
                {
                    "examined": examined,
                    "arm": arm,
                    "minus_exgrpo": {rate: row for rate, row in found.items() if row},
                    "from_step_1": gap(runs, CORNER, from_step_1(arm), f"{LOSING} again"),
                }
            )
    return rows


def again_rows(runs: list[dict]) -> list[dict]:
    """The runs that were made twice: held-out accuracy of both."""
    first = {key_of(run): run for run in runs}
    return [
        {
            "arm": run["arm"].removesuffix(" again"),
            "seed": run["seed"],
            "first": first[CORNER, run["arm"].removesuffix(" again"), run["seed"]]["end"],
            "again": run["end"],
        }
        for run in runs
        if run["arm"] in AGAIN
    ]


def gap(runs: list[dict], rate: float, arm: str, base: str) -> dict | None:
    """Held-out accuracy at the end, arm minus base, over the seeds that have both."""
    by_key = {key_of(run): run for run in runs}
    pairs = [
        (run, other)
        for run in runs
        if key_of(run)[:2] == (rate, arm) and (other := by_key.get((rate, base, run["seed"])))
    ]
    gaps = [run["end"] - other["end"] for run, other in pairs if run["start"] == other["start"]]
    return interval(gaps) if gaps else None


def print_table(rows: list[dict]) -> None:
    print(
        f"{'start %':>8} {'':36}{'seeds':>5}{'end %':>7}{'- on-policy':>13}{'':16}{'at equal tokens':>16}"
    )
    for row in rows:
        gap, equal = row["minus_on_policy"], row["minus_on_policy_at_equal_tokens"]
        print(
            f"{100 * row['start']:8.1f} {row['arm']:36}{row['seeds']:5}"
            f"{100 * row['end']['mean']:7.1f}{100 * gap['mean']:+13.1f}{bounds(gap):>16}"
            f"{100 * equal['mean']:+16.1f}{bounds(equal):>16}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Starting success rate x method x seeds.")
    parser.add_argument("--runs", type=Path, default=Path("runs/study_when"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", choices=EVERY_ARM, help="these alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print and draw what is there")
    arguments = parser.parse_args()
    runs = load_runs(arguments.out)
    if arguments.table:
        from figures import draw_when

        save(arguments.out, runs)
        print_table(table_of(runs))
        draw_when(json.loads(arguments.out.read_text()), arguments.out.with_suffix(".png"))
        return
    torch.set_num_threads(1)
    shop = Workshop(arguments.runs)
    done = {key_of(run) for run in runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for rate, arm, seed in cells(arguments.seeds):
        if (rate, arm, seed) in done or (arguments.arms and arm not in arguments.arms):
            continue
        runs.append(run_cell(shop, arm, rate, seed, runs))
        save(arguments.out, runs)
        found = runs[-1]
        seconds = found["curve"][-1]["cpu_seconds"]
        print(
            f"{rate:g} {arm} seed {seed}: {found['start']:.3f} -> {found['end']:.3f}, {seconds:.0f} s",
            flush=True,
        )
    for pool in shop.pools.values():
        pool.close()


if __name__ == "__main__":
    main()
