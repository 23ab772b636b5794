"""vLLM in the trainer's process: one GPU, two copies of the weights, one asleep if need be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    EngineLost,
    LocalEngine,
    Observer,
    Request,
    Sampling,
)
from exgrpo_fast.rollout.vllm.model import VllmModel, untouched_random_state


@dataclass(eq=False)
class VllmEngine(LocalEngine):
    """The policy's weights copied into a `VllmModel` after every update."""

    model: VllmModel
    policy: Policy
    sleeps: bool = False  # weights and cache leave the GPU while the trainer updates
    version: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.awake = not self.sleeps  # a model that can sleep has been put to sleep before

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        self.wake()
        model, completions = self.model, dict[int, Completion]()
        try:
            with untouched_random_state():
                place_of = {model.add(request, sampling): i for i, request in enumerate(requests)}
                while len(completions) < len(requests):
                    model.step()
                    finished = {place_of[key]: c for key, c in model.take(place_of).items()}
                    completions |= finished
                    if finished:
                        observer.finished(list(finished), list(finished.values()))
                    observer.on_poll()
        except BaseException:
            model.drop_requests()
            raise
        return [completions[i] for i in range(len(requests))]

    def wake(self) -> None:
        """With the weights it had, where it sleeps."""
        if not self.awake:
            self.sync(self.version)

    def sync(self, version: int) -> dict[str, float]:
        try:
            if not self.awake:
                torch.cuda.empty_cache()  # a wake-up out of memory leaks what it had mapped
                self.model.wake_for_weights()
            self.model.load(self.policy.named_weights(), version)
            if not self.awake:
                self.model.wake_for_requests()
        except torch.OutOfMemoryError as error:
            raise EngineLost(
                f"vLLM cannot wake up beside the trainer: {error}; lower rollout.kv_cache_gib"
            ) from None
        self.awake, self.version = True, version
        return {}

    def on_update_start(self) -> None:
        if self.sleeps and self.awake:
            self.model.sleep()
            self.awake = False

    def close(self) -> None:
        self.model.close()
