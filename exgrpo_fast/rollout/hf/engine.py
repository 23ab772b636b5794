"""Rollouts by the transformers model that is trained: no sync, and no copy of the weights but the packed
one that a CPU works with while it generates.

Continuous batching is not used: it has one seed per engine and draws from the process-wide random
state, while a request here owns its seed. Tokens are drawn by inverse CDF with a counter-based hash
(`drawing.py`), so a completion depends on its own seed only, not on its neighbours. That lets a batch
that the device has no memory for be generated in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.core.types import Completion, KeptTokens
from exgrpo_fast.model.oom import not_even_one, nothing_smaller, until_it_fits
from exgrpo_fast.model.policy import Policy, inference
from exgrpo_fast.rollout.engine import UNOBSERVED, LocalEngine, Observer, Request, Sampling
from exgrpo_fast.rollout.hf.decoding import Decoding
from exgrpo_fast.rollout.hf.packed_decoder import PackedDecoder, can_be_decoded
from exgrpo_fast.rollout.hf.packed_weights import LEAST_TOKENS, has_products_in, packed_weights

KEYS = "rollout.max_completion_tokens or data.max_prompt_tokens"


@dataclass(eq=False)
class TransformersEngine(LocalEngine):
    """Batched generation of at most `max_batch_sequences` sequences side by side.

    Keys and values of all of them are held. Where the device's memory runs out, the batch is
    generated again with half as many, time and again; the number that fits stays.
    """

    policy: Policy
    _: KW_ONLY
    eos_token_ids: Sequence[int]
    pad_token_id: int
    max_batch_sequences: int = 256
    halvings: int = field(default=0, init=False)  # times that memory ran out, since the last sync
    _decoder: PackedDecoder | None = field(default=None, init=False)  # of `same_weights`

    def sync(self, version: int) -> dict[str, float]:
        """Nothing to send: these are the trainer's parameters. How often memory ran out since the
        last call."""
        halvings, self.halvings = self.halvings, 0
        return {"generation_halvings": halvings}

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
        packed = self._packed(requests, sampling)
        with inference(self.policy.model), self.policy.autocast(), packed as decoder:
            while order:
                waiting = [requests[i] for i in order]
                batch = self._first_batch(waiting, sampling, decoder, observer.on_poll)
                members, order = order[: len(batch)], order[len(batch) :]
                for i, completion in zip(members, batch, strict=True):
                    completions[i] = completion
                observer.finished(members, batch)
        return [completion for completion in completions if completion is not None]

    @contextmanager
    def same_weights(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[None]:
        """Inside, several calls of `generate` share one packed copy of the weights, none of which may
        change; together they have these `requests`."""
        with torch.no_grad(), self._packed(requests, sampling) as self._decoder:
            try:
                yield
            finally:
                self._decoder = None

    @contextmanager
    def _packed(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[PackedDecoder | None]:
        """Around batches that are long enough to pay for a copy of the weights: what draws all tokens
        but the first of each completion; None: the model itself."""
        if self._decoder is not None:
            yield self._decoder
            return
        longest = max((request.limit(sampling) for request in requests), default=0)
        model, dtype = self.policy.model, self.policy.compute_dtype
        if not has_products_in(dtype) or longest < LEAST_TOKENS:
            yield None
            return
        rows = min(len(requests), self.max_batch_sequences)
        if can_be_decoded(model, dtype):
            yield PackedDecoder(model, rows=rows, dtype=dtype)
            return
        with packed_weights(model, rows=rows, dtype=dtype):
            yield None

    def _first_batch(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        decoder: PackedDecoder | None,
        on_poll: Callable[[], None],
    ) -> list[Completion]:
        """Of as many of the first requests as fit side by side."""

        def generate() -> list[Completion]:
            first = requests[: self.max_batch_sequences]
            return self._generate_batch(first, sampling, decoder, on_poll)

        def shrink(cause: str) -> None:
            count = min(self.max_batch_sequences, len(requests))
            if count == 1:
                longest = len(requests[0].prompt_ids) + requests[0].limit(sampling)
                raise nothing_smaller(
                    self.policy.model,
                    during="generation",
                    why=not_even_one(longest, KEYS),
                    longest=longest,
                    cause=cause,
                )
            self.max_batch_sequences = count // 2
            self.halvings += 1

        return until_it_fits(generate, shrink, during="generation", device=self.policy.device)

    def _generate_batch(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        decoder: PackedDecoder | None,
        on_poll: Callable[[], None],
    ) -> list[Completion]:
        device = self.policy.device
        prompts = {request.prompt_ids: None for request in requests}
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for prompt, row in row_of.items():  # left padding: generation goes on at the right
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        limits = [request.limit(sampling) for request in requests]
        decoding = Decoding(
            prompt_of=[row_of[request.prompt_ids] for request in requests],
            seeds=[request.seed for request in requests],
            limits=limits,
            sampling=sampling,
            eos_token_ids=self.eos_token_ids,
            device=device,
            on_poll=on_poll,
        )
        ids, mask = to_device([ids, mask], device)
        decoding.run(self.policy.model, ids, mask, decoder)
        logprobs = decoding.logprobs_RT.to("cpu", non_blocking=True)
        entropies: Sequence[Tensor | None] = [None] * len(requests)
        if decoding.entropies_RT is not None:
            entropies = list(decoding.entropies_RT.to("cpu", non_blocking=True))
        tokens = decoding.tokens_RT.cpu()  # waits, for the others too
        rows = zip(tokens, logprobs, decoding.kept_tokens(), entropies, limits, strict=True)
        return [
            self._cut(tokens[:limit], logprobs, kept, entropies)
            for tokens, logprobs, kept, entropies, limit in rows
        ]

    def _cut(
        self, tokens: Tensor, logprobs: Tensor, kept: KeptTokens | None, entropies: Tensor | None
    ) -> Completion:
        ends = torch.isin(tokens, torch.tensor(list(self.eos_token_ids))).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Completion(
            token_ids=tokens[:length].clone(),
            logprobs=logprobs[:length].clone(),
            truncated=not len(ends),
            kept=None if kept is None else kept.first(length),
            entropies=None if entropies is None else entropies[:length].clone(),
        )
