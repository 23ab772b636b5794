"""Make the quickstart's starting point: tokenizer, model, and a warm start to a middling policy.

The warm start is supervised, by the very loss the trainer uses: REINFORCE with advantage 1 is NLL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.build.before_torch import solved_task
from exgrpo_fast.build.quickstart.solutions import solved_examples
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.config import Config, GymTask
from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.model.packing import Ragged, pack
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.optim.optimiser import Optimiser, warmup_then_decay
from exgrpo_kernels import PolicyObjective, linear_policy_loss

LATE_GUESS_SHARE = 0.97  # of the examples of the last `guess_batches`
EXAMPLES_SEED = 1_000_000  # gym rows are drawn from seed + index: far from train and eval seeds


def prepare_quickstart(config: Config, path: Path, screen: Screen, *, device: str) -> None:
    """Write a Hugging Face folder with a policy that solves a third of the task.

    Held-out questions are kept out of the imitated examples. ConfigError when the task has no
    generated solutions.
    """
    task = solved_task(config)
    settings, seed = config.warm_start, config.train.seed
    with screen.phase("make examples"):
        pairs = imitated_pairs(config, task)
        tokenizer = make_tokenizer(f"{question}\n{solution}" for question, solution in pairs[:2000])
        policy = Policy(
            make_model(tokenizer, seed=seed),
            device=device,
            max_tokens_per_microbatch=config.microbatch_tokens,
        )
        examples = tokenize_examples(pairs, tokenizer)
    same: dict[str, Any] = {"batch_size": settings.batch_size, "seed": seed, "screen": screen}
    warm_start(policy, examples, batches=settings.batches, lr=settings.lr, **same)
    if settings.guess_batches:
        guesses = imitated_pairs(config, task, guess_share=LATE_GUESS_SHARE)
        examples = tokenize_examples(guesses, tokenizer)
        # a habit moves fast; what it knows of sums should stay
        warm_start(policy, examples, batches=settings.guess_batches, lr=settings.lr / 10, **same)
    policy.model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def imitated_pairs(
    config: Config, task: GymTask, *, guess_share: float | None = None
) -> list[tuple[str, str]]:
    settings, seed = config.warm_start, config.train.seed
    larger = {"size": settings.examples, "seed": EXAMPLES_SEED * (1 + seed)}
    held_out: set[str] = set()
    if isinstance(config.data.eval, GymTask):
        held_out = {q for q, _ in solved_examples(config.data.eval, guess_share=0.0, seed=0)}
    pairs = solved_examples(
        task.model_copy(update=larger),
        guess_share=settings.guess_share if guess_share is None else guess_share,
        revision_share=settings.revision_share,
        seed=seed,
        leave_out=held_out,
    )
    return list(pairs)


# --- warm start -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    prompt_ids: tuple[int, ...]
    completion_ids: Tensor  # int64 [T], the end-of-sequence token included


def tokenize_examples(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Example]:
    """(question, solution) -> the chat prompt and the solution, ended like a completion."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question, _ in pairs
    ]
    eos = tokenizer.eos_token
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer([s + eos for _, s in pairs], add_special_tokens=False)["input_ids"]
    return [
        Example(tuple(p), torch.tensor(r)) for p, r in zip(prompt_ids, completion_ids, strict=True)
    ]


def warm_start(
    policy: Policy,
    examples: Sequence[Example],
    *,
    batches: int,
    batch_size: int,
    lr: float,
    seed: int,
    screen: Screen,
) -> None:
    """Imitate `batches` random batches of the examples, the rate falling to 0 over the last half."""
    optimiser = Optimiser(
        policy.trainable_parameters,
        lr=lr,
        betas=(0.9, 0.95),  # short and steep: the variance has to forget the first batches
        schedule=warmup_then_decay(20, batches),
    )
    rng = np.random.default_rng([seed, 0x3A7])
    with screen.phase("warm start", batches) as advance:
        for _ in range(batches):
            picks = rng.integers(len(examples), size=batch_size)
            imitate(policy, [examples[i] for i in picks])
            optimiser.step()
            advance(1)


def imitate(policy: Policy, examples: Sequence[Example]) -> None:
    """Add the gradient of the mean negative log-likelihood of the completion tokens."""
    prompts = Ragged.of([example.prompt_ids for example in examples])
    completions = Ragged.of([example.completion_ids for example in examples])
    num_tokens = len(completions.values)
    limit = policy.max_tokens_per_microbatch
    for packed in pack(prompts, completions, max_tokens=limit, device=policy.device):
        hidden_ND = policy.hidden_states(packed)
        weight, bias, softcap = policy.head_for(hidden_ND)
        ones = torch.ones(len(packed.targets), device=policy.device)
        linear_policy_loss(
            hidden_ND,
            weight,
            packed.targets,
            advantages=ones,
            behaviour_logprobs=torch.zeros_like(ones),
            weights=ones / num_tokens,
            objective=PolicyObjective(surrogate="reinforce"),
            bias=bias,
            softcap=softcap,
        ).loss.backward()
