"""Rollouts by transformers' `generate` with the trainer's own weights: no copy, no sync.

Continuous batching is not used: it has one seed per engine and draws from the process-wide random
state, while a request here owns its seed. Sampling is done inside a logits processor by inverse
CDF with a counter-based hash, so a completion depends on its own seed only, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from exgrpo_fast.experience import Completion
from exgrpo_fast.policy import Policy, inference
from exgrpo_fast.rollout.engine import UNOBSERVED, LocalEngine, Observer, Request, Sampling


class TransformersEngine(LocalEngine):
    """Batched generation of at most `max_batch_sequences` sequences side by side."""

    def __init__(
        self,
        policy: Policy,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_sequences: int = 256,
    ) -> None:
        self.policy = policy
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.max_batch_sequences = max_batch_sequences

    def sync(self, version: int) -> dict[str, float]:
        """Nothing to do: these are the trainer's parameters."""
        return {}

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        completions: list[Completion | None] = [None] * len(requests)
        # Prompts of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        with inference(self.policy.model), self.policy.autocast():
            for start in range(0, len(order), self.max_batch_sequences):
                members = order[start : start + self.max_batch_sequences]
                batch = self._generate_batch(
                    [requests[i] for i in members], sampling, observer.waiting
                )
                for i, completion in zip(members, batch, strict=True):
                    completions[i] = completion
                observer.finished(members, batch)
        return [completion for completion in completions if completion is not None]

    def _generate_batch(
        self, requests: Sequence[Request], sampling: Sampling, waiting: Callable[[], None]
    ) -> list[Completion]:
        device = self.policy.device
        width = max(len(request.prompt_ids) for request in requests)
        prompts = torch.full((len(requests), width), self.pad_token_id, device=device)
        mask = torch.zeros_like(prompts)
        for row, request in enumerate(requests):  # left padding: generation goes on at the right
            prompts[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        limits = [r.max_completion_tokens or sampling.max_completion_tokens for r in requests]
        sampler = SeededSampler([r.seed for r in requests], sampling, width, device, waiting)
        model: Any = self.policy.model
        output = model.generate(
            input_ids=prompts,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                max_new_tokens=max(limits),
                do_sample=False,  # the processor has drawn; what is left is to take the maximum
                eos_token_id=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
            ),
        )
        tokens = output[:, width:].cpu()
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu()
        return [
            self._cut(row[:limit], row_logprobs[:limit])
            for row, row_logprobs, limit in zip(tokens, logprobs, limits, strict=True)
        ]

    def _cut(self, tokens: Tensor, logprobs: Tensor) -> Completion:
        ends = torch.isin(tokens, torch.tensor(self.eos_token_ids)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Completion(
            token_ids=tokens[:length].clone(),
            logprobs=logprobs[:length].clone(),
            truncated=not len(ends),
        )


class SeededSampler(LogitsProcessor):
    """Draws one token per row from softmax(logits / temperature) and leaves only that token.

    The uniform number of row b at position t is a hash of (seed_b, t). `logprobs` collects the
    log-probability of what was drawn, under the distribution it was drawn from.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_width: int,
        device: torch.device,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """`waiting` is called once a token."""
        self.seeds_B = torch.tensor([signed(s) for s in seeds], dtype=torch.int64, device=device)
        self.sampling = sampling
        self.prompt_width = prompt_width
        self.logprobs: list[Tensor] = []  # one float32 [B] per position
        self.waiting = waiting

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.waiting()
        greedy = self.sampling.temperature == 0.0
        logprobs_BV = (scores.float() / (1.0 if greedy else self.sampling.temperature)).log_softmax(
            dim=-1
        )
        if greedy:
            drawn_B = logprobs_BV.argmax(dim=-1)
        else:
            logprobs_BV = keep_nucleus(logprobs_BV, self.sampling.top_p)
            position = input_ids.shape[1] - self.prompt_width
            drawn_B = invert_cdf(logprobs_BV, hash_uniform(self.seeds_B, position))
        self.logprobs.append(logprobs_BV.gather(1, drawn_B[:, None])[:, 0])
        only_drawn = torch.full_like(scores, -torch.inf)
        return only_drawn.scatter_(1, drawn_B[:, None], 0.0)


def invert_cdf(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """First token whose cumulated probability exceeds u x total; never one of probability 0."""
    cdf_BV = logprobs_BV.exp().cumsum(dim=-1)
    total_B = cdf_BV[:, -1]
    # u < 1, but u x total may round up to total, behind which only zeros come.
    point_B = torch.minimum(
        uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B))
    )
    drawn_B = torch.searchsorted(cdf_BV, point_B[:, None], right=True)[:, 0]
    return drawn_B.clamp(max=logprobs_BV.shape[1] - 1)  # NaN sorts behind all; the scores refuse it


def keep_nucleus(logprobs_BV: Tensor, top_p: float) -> Tensor:
    """Renormalise over the smallest set of tokens with probability >= top_p."""
    if top_p >= 1.0:
        return logprobs_BV
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.exp().cumsum(dim=-1) - sorted_BV.exp()
    dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
    dropped_BV.scatter_(1, order_BV, before_BV >= top_p)
    return logprobs_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(dim=-1)


def hash_uniform(seeds_B: Tensor, position: int) -> Tensor:
    """int64 [B], t -> float32 [B] in (0, 1): SplitMix64 (Steele, Lea, Flood 2014) of seed + t."""
    z = seeds_B + signed((position + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    z = (z ^ _shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return (_shift(z, 41).float() + 0.5) / (1 << 23)  # 23 bits and a half are exact in float32


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right (torch's is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
