"""Drafts and scores by two vLLM models in this process: the policy's and the prior's.

Both are stateless towards the driver; their prefix caches make that cheap. Drafts run in the same
engine and at the same time as the fresh completions, because whoever steps it moves all of them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from exgrpo_fast.experience.prior.protocols import Draft, DraftScores, Drawn, EngineResult, Prefix
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.vllm.engine import VllmEngine
from exgrpo_fast.rollout.vllm.model import VllmModel, untouched_random_state

R = TypeVar("R")


@dataclass(eq=False)
class Awaited(EngineResult[R]):
    """The result of requests to one model; `ready` steps that model once."""

    model: VllmModel
    keys: list[str]
    finish: Callable[[list[Any]], R]
    again: Callable[[int], str] | None = None  # queues the request of a place anew; its key
    found: dict[str, Any] = field(default_factory=dict)

    def ready(self) -> bool:
        self._take()
        if len(self.found) < len(self.keys):
            with untouched_random_state():
                self.model.step()
            self._take()
        return len(self.found) == len(self.keys)

    def result(self) -> R:
        while not self.ready():
            pass
        return self.finish([self.found[key] for key in self.keys])

    def _take(self) -> None:
        taken = self.model.take(set(self.keys) - self.found.keys())
        for place, key in enumerate(self.keys):
            if key in taken and taken[key] is None and self.again is not None:
                self.keys[place] = self.again(place)
        self.found |= {key: value for key, value in taken.items() if value is not None}


class VllmDrafter:
    """The policy, in the engine that also makes the fresh completions."""

    concurrent = True

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine

    def draft(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        seeds: Sequence[int],
        *,
        distributions: bool = False,
    ) -> Awaited[list[Draft]]:
        assert not distributions, "vLLM returns no whole distributions"
        self.engine.wake()
        model = self.engine.model
        keys = [
            model.add(Request(tuple(prefix.token_ids), seed, length), Sampling(length))
            for prefix, length, seed in zip(prefixes, lengths, seeds, strict=True)
        ]
        return Awaited(
            model, keys, lambda found: [Draft(c.token_ids.tolist(), c.logprobs) for c in found]
        )

    def forget(self) -> None:
        """The engine resets its prefix cache with every update."""


class VllmPrior:
    """The frozen prior; its prefix cache outlives the steps."""

    def __init__(self, model: VllmModel) -> None:
        self.model = model
        self.prefix_block: int | None = model.cache_block_tokens
        self.num_retries = 0  # calls that had to be asked twice

    def score(
        self,
        prefixes: Sequence[Prefix],
        drafts: Sequence[Sequence[int]],
        *,
        distributions: bool = False,
    ) -> Awaited[list[DraftScores]]:
        assert not distributions, "vLLM returns no whole distributions"
        parts = [(prefix.token_ids, draft) for prefix, draft in zip(prefixes, drafts, strict=True)]
        return self._score(parts, lambda found: [DraftScores(logprobs) for logprobs in found])

    def draw(self, prefixes: Sequence[Prefix], seeds: Sequence[int]) -> Awaited[list[Drawn]]:
        one = Sampling(1)
        keys = [
            self.model.add(Request(tuple(prefix.token_ids), seed), one)
            for prefix, seed in zip(prefixes, seeds, strict=True)
        ]
        return Awaited(
            self.model,
            keys,
            lambda found: [Drawn(int(c.token_ids[0]), float(c.logprobs[0])) for c in found],
        )

    def whole_completions(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]
    ) -> list[Tensor]:
        parts = [(list(p), r.tolist()) for p, r in zip(prompts, completions, strict=True)]
        return self._score(parts, list).result()

    def forget(self) -> None:
        """Its weights never change."""

    def _score(
        self, parts: Sequence[tuple[list[int], Sequence[int]]], finish: Callable[[list[Any]], R]
    ) -> Awaited[R]:
        def ask(place: int, *, read_cache: bool) -> str:
            prefix, suffix = parts[place]
            return self.model.add_scoring([*prefix, *suffix], len(prefix), read_cache=read_cache)

        def again(place: int) -> str:
            self.num_retries += 1
            return ask(place, read_cache=False)

        keys = [ask(place, read_cache=True) for place in range(len(parts))]
        return Awaited(self.model, keys, finish, again)
