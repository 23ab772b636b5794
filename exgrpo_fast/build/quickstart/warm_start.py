"""Supervised warm start, by the very loss the trainer uses: REINFORCE with advantage 1 is NLL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.model.packing import Ragged, pack
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.optim.optimiser import Optimiser, warmup_then_decay
from exgrpo_kernels import PolicyObjective, linear_policy_loss


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
