"""What does guiding by a prior cost: rounds, waste and tokens per round, and seconds of a step?

    python bench/eapo.py [--completions 16] [--tokens 400]

With K tokens drafted a round and a share R of the drafts rejected, a round emits
E(K, R) = (1 - (1 - R)^K) / R tokens on average and throws K / E drafts away for each kept one. The
driver with the transformers lanes runs a small policy and a prior of the same shape, for several K
and thresholds; R is measured, not set: redrawn tokens over all tokens. Responses have no end but
the limit, and each round is compared with E of what it drafted: the last ones have less room.

Seconds: guided completions against as many fresh ones from the transformers engine, in turns in one
process, medians. Writes eapo.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import torch
from loss import machine

from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.experience.prior.driver import Resampler, Session
from exgrpo_fast.experience.prior.hf_backend import TransformersDrafter, TransformersPrior
from exgrpo_fast.experience.prior.triggers import Trigger
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine

NO_END = 1 << 30  # an id that nothing has


def expected_tokens(block_tokens: int, rate: float) -> float:
    """E(K, R): tokens that a round emits, the redrawn one included."""
    return (1 - (1 - rate) ** block_tokens) / rate


def make_pair(vocabulary: int, noise: float) -> tuple[Policy, Policy]:
    """A policy of 3 layers and width 128, and a prior whose head differs by some noise."""
    tokenizer = make_tokenizer(["1 + 2"] * 3, vocab_size=vocabulary)
    models = [make_model(tokenizer, seed=0) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = models[0].lm_head.weight.mul_(20)  # sharp, as a language model's is
        change = torch.randn(weight.shape, generator=generator)
        models[1].lm_head.weight.copy_(weight + noise * change)
    policy, prior = (Policy(model) for model in models)
    return policy, prior


class CountingDrafter(TransformersDrafter):
    """Notes how many tokens each round of each completion drafts."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.lengths: list[int] = []

    def draft(self, prefixes, lengths, seeds, *, distributions=False):
        self.lengths += lengths
        return super().draft(prefixes, lengths, seeds, distributions=distributions)


def guide(
    pair: tuple[Policy, Policy], requests: list[Request], arguments, **settings
) -> tuple[Session, list[int]]:
    policy, prior = pair
    width = policy.head.weight.shape[0]
    drafter = CountingDrafter(policy, vocabulary_size=width, eos_token_ids=[NO_END])
    resampler = Resampler(
        drafter,
        TransformersPrior(prior, num_tokens=width, vocabulary_size=width),
        Trigger("ratio", settings["threshold"]),
        block_tokens=settings["block_tokens"],
        max_completion_tokens=arguments.tokens,
        eos_token_ids=[NO_END],
    )
    session = resampler.start(requests)
    session.finish()
    return session, drafter.lengths


def measure(pair, requests, arguments, *, block_tokens: int, threshold: float) -> dict:
    start = time.perf_counter()
    settings = {"block_tokens": block_tokens, "threshold": threshold}
    session, lengths = guide(pair, requests, arguments, **settings)
    seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in session.completions)
    rounds = sum(completion.rounds for completion in session.completions)
    drafted = sum(completion.drafted for completion in session.completions)
    rate = sum(sum(completion.redrawn) for completion in session.completions) / tokens
    expected = statistics.fmean(expected_tokens(length, rate) for length in lengths)
    waste = statistics.fmean(lengths) / expected
    return {
        **settings,
        "rate": rate,
        "rounds_of_the_batch": max(completion.rounds for completion in session.completions),
        "tokens_per_round": tokens / rounds,
        "tokens_per_round_expected": expected,
        "tokens_per_round_off": tokens / rounds / expected - 1,
        "waste": drafted / tokens,
        "waste_expected": waste,
        "waste_off": drafted / tokens / waste - 1,
        "seconds": seconds,
        "seconds_by_phase": session.seconds,
    }


def fresh_seconds(policy: Policy, requests: list[Request], arguments) -> float:
    engine = TransformersEngine(policy, eos_token_ids=[NO_END], pad_token_id=0)
    start = time.perf_counter()
    engine.generate(requests, Sampling(arguments.tokens))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds, waste and seconds of guided completions.")
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--noise", type=float, default=0.03)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 20, 32])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5])
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison of seconds")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/eapo.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pair = make_pair(arguments.vocabulary, arguments.noise)
    requests = [Request(tuple(range(5, 25 + i % 17)), i) for i in range(arguments.completions)]
    rows = []
    for threshold in arguments.thresholds:
        for block_tokens in arguments.blocks:
            row = measure(pair, requests, arguments, block_tokens=block_tokens, threshold=threshold)
            rows.append(row)
            print(
                f"tau {threshold}  K {block_tokens:3}  R {row['rate']:.4f}  tokens/round "
                f"{row['tokens_per_round']:.2f} ({100 * row['tokens_per_round_off']:+.1f} %)  waste "
                f"{row['waste']:.3f} ({100 * row['waste_off']:+.1f} %)  {row['seconds']:.1f} s",
                flush=True,
            )
    seconds: dict[str, list[float]] = {"fresh": [], "guided": []}
    for _ in range(arguments.repeats):
        seconds["fresh"].append(fresh_seconds(pair[0], requests, arguments))
        row = measure(pair, requests, arguments, block_tokens=20, threshold=0.5)
        seconds["guided"].append(row["seconds"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "threads": torch.get_num_threads(),
        "completions": arguments.completions,
        "tokens": arguments.tokens,
        "rows": rows,
        "largest_gap_to_E": max(
            abs(row[name]) for row in rows for name in ("tokens_per_round_off", "waste_off")
        ),
        "seconds": seconds,
        "guided_over_fresh": medians["guided"] / medians["fresh"],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))
    print(json.dumps({k: results[k] for k in ("largest_gap_to_E", "guided_over_fresh")}))


if __name__ == "__main__":
    main()
