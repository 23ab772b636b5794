"""When does experience pay? Starting success rate x method x seeds, on small sums.

    python bench/study_when.py --runs runs/study_when [--seeds 5]
    python bench/study_when.py --table          the table of what is there, and the figure

The policy (2 layers, width 96) learns to show the steps of a sum; a copy of it then learns to name a
wrong number instead. The starts lie on the straight line between the weights of the two, where about
1, 3, 10, 25, 50 % of the training questions are solved.
From each of these starts every method trains until it has generated the same number of completions
(study_when_arms.py lists methods, starts and budgets): revisions and prior-guided completions count,
and EAPO begins with half of the budget spent, for its prior is the on-policy run of the same seed at
that point. All methods share Dr.GRPO, learning rate and step size. HeRL alone is rewarded by rubrics;
held-out accuracy is the exact answer for all.

Each finished run is one record of the JSON, written at once; what is recorded is not done again.
Seed 0 of every cell comes first, then seed 1, ... A record holds held-out accuracy along the run with
completions, tokens generated, tokens trained and CPU seconds of the trainer's process (evaluation
left out); study_when_table.py compares methods at equal completions and at equal compute.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_when_arms import BASELINE, BUDGETS, CORNER, EVERY_ARM, TOY, cells
from study_when_table import again_rows, choice_rows, draw, key_of, print_table, table_of

from exgrpo_fast.build.assembly import make_evaluator, make_trainer, make_verifier
from exgrpo_fast.build.data import load_data
from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.experience import make_prior
from exgrpo_fast.build.models import make_policy
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
POINTS = 4  # held-out evaluations along a run, the last one with all questions and 8 completions
FEW_QUESTIONS, FEW_COMPLETIONS = 64, 4
QUESTIONS, COMPLETIONS = 128, 8
BASE_BATCHES, GUESS_BATCHES = 1200, 80
NEVER_CORRECT = (30, 100)  # no sum of three digits lies there


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


# --- the record ----------------------------------------------------------------------------------


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
        save(arguments.out, runs)
        print_table(table_of(runs))
        draw(json.loads(arguments.out.read_text()), arguments.out.with_suffix(".png"))
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
