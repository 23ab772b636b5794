"""What sharing prompts saves: tokens that are read and the time of an update.

Groups of 8 responses of unequal lengths to each prompt, one `Learner.rehearse` (all forward and
backward passes of an update) over them: as they are packed, and with the sharing switched off, turn
by turn in one process. The gradients of both are compared.

    python bench/packing.py [--out bench/results/cpu/packing.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from exgrpo_fast.core.types import Group, Question, Trajectory, Verdict
from exgrpo_fast.model import packing
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.training.advantages import AdvantageRule, dr_grpo
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_kernels import PolicyObjective

MODEL = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
GROUPS, GROUP_SIZE, PACK_TOKENS = 2, 8, 4096
CASES = [(prompt, longest) for prompt in (64, 256) for longest in (64, 128, 256, 512)]


def make_groups(prompt_tokens: int, longest: int) -> list[Group]:
    """Responses of half the longest length to all of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(MODEL.vocab_size, (count,), generator=generator)

    lengths = torch.linspace(longest // 2, longest, GROUP_SIZE).int().tolist()
    groups = []
    for number in range(GROUPS):
        question = Question(str(number), tuple(draw(prompt_tokens).tolist()), "", "")
        responses = tuple(
            Trajectory(
                question,
                token_ids=draw(length),
                behaviour_logprobs=torch.full((length,), -8.0),
                entropies=torch.zeros(length),
                truncated=False,
                verdict=Verdict(float(place % 2)),
            )
            for place, length in enumerate(lengths)
        )
        groups.append(AdvantageRule(dr_grpo).apply(Group(question, responses)))
    return groups


@contextlib.contextmanager
def nothing_shared() -> Iterator[None]:
    """Every prompt counts as one of its own."""

    def apart(prompts: Ragged) -> torch.Tensor:
        return torch.arange(len(prompts))

    with mock.patch.object(packing, "same_prompts", apart):
        yield


def measure(prompt_tokens: int, longest: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODEL)
    policy = Policy(model, gradient_checkpointing=True, max_tokens_per_microbatch=PACK_TOKENS)
    learner = Learner(
        policy,
        Optimiser(policy.trainable_parameters, lr=1e-6),
        weights=WeightRule("constant", longest),
    )
    groups = make_groups(prompt_tokens, longest)
    ways: dict[str, Callable[[], Any]] = {
        "shared": contextlib.nullcontext,
        "apart": nothing_shared,
    }
    tokens: dict[str, int] = {}
    gradients: dict[str, torch.Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        with way():
            tokens[name], gradients[name] = look(learner, groups)
    for _ in range(repeats):
        for name, way in ways.items():
            with way():
                start = time.perf_counter()
                learner.rehearse(groups, PolicyObjective())
                seconds[name].append(time.perf_counter() - start)
    difference = (gradients["shared"] - gradients["apart"]).norm() / gradients["apart"].norm()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [s / a for s, a in zip(seconds["shared"], seconds["apart"], strict=True)]
    return {
        "prompt_tokens": prompt_tokens,
        "longest_response": longest,
        "tokens_shared": tokens["shared"],
        "tokens_apart": tokens["apart"],
        "tokens_ratio": round(tokens["shared"] / tokens["apart"], 4),
        "seconds_shared": round(medians["shared"], 4),
        "seconds_apart": round(medians["apart"], 4),
        "seconds_ratio": round(statistics.median(ratios), 4),
        "gradient_difference": float(difference),
    }


def look(learner: Learner, groups: list[Group]) -> tuple[int, torch.Tensor]:
    """Tokens that an update reads, and its gradient."""
    read: list[int] = []
    policy, made = learner.policy, []
    forward = policy.hidden_states

    def count(packed: packing.Pack) -> torch.Tensor:
        read.append(len(packed.input_ids))
        return forward(packed)

    def keep() -> None:
        made.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters]))  # pyright: ignore
        policy.model.zero_grad(set_to_none=True)

    with (
        mock.patch.object(policy, "hidden_states", count),
        mock.patch.object(learner.optimiser, "discard", keep),
    ):
        learner.rehearse(groups, PolicyObjective())
    return sum(read), made[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/packing.json"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(*case, arguments.repeats))
        print(json.dumps(rows[-1]), flush=True)
    results = {
        "bench": "packing",
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": "qwen3, 4 layers of width 256, vocabulary 4096, float32, checkpointing",
        "groups": GROUPS,
        "group_size": GROUP_SIZE,
        "pack_tokens": PACK_TOKENS,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
