"""Rank 0 generates and broadcasts the completions; all ranks take part in sending the weights.

An engine reads the weights of its policy, and may score with it, any number of times. With a sharded
policy each of these is a collective. So the engine of rank 0 has a policy that broadcasts what it is
about to do, and the other ranks do the same until rank 0 broadcasts the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.core.process_group import MainRankFailed, Processes
from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, Scores
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    Generation,
    LocalEngine,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
)
from exgrpo_fast.rollout.wire import pack_completion, unpack_completion


@dataclass(eq=False)
class SharedEngine(RolloutEngine):
    """The engine of rank 0, for all ranks."""

    engine: RolloutEngine | None  # made with an `AnnouncedPolicy`; None on ranks other than 0
    policy: Policy
    processes: Processes

    def __post_init__(self) -> None:
        assert (self.engine is not None) == self.processes.is_main

    def start(self, requests: Sequence[Request], sampling: Sampling) -> SharedGeneration:
        own = self.engine.start(requests, sampling) if self.engine else None
        return SharedGeneration(own, self.policy, self.processes)

    def sync(self, version: int) -> dict[str, float]:
        if self.engine is None:
            return follow_rank0(self.policy, self.processes)["figures"]
        try:
            figures = self.engine.sync(version)
        except BaseException:
            self.processes.broadcast({"do": "fail"})
            raise
        self.processes.broadcast({"do": "end", "figures": figures})
        return figures

    def on_update_start(self) -> None:
        if self.engine:
            self.engine.on_update_start()

    def close(self) -> None:
        if self.engine:
            self.engine.close()


@dataclass(frozen=True)
class SharedGeneration:
    """Completions on their way to rank 0, and from it to the other ranks."""

    own: Generation | None
    policy: Policy
    processes: Processes

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """`observer` is called on rank 0 only. A server that comes back is sent the weights, in
        which all ranks take part."""
        if self.own is None:
            entries = follow_rank0(self.policy, self.processes)["completions"]
            return [unpack_completion(entry)[1] for entry in entries]
        try:
            completions = self.own.wait(observer)
        except BaseException:
            self.processes.broadcast({"do": "fail"})
            raise
        packed = [pack_completion(place, each) for place, each in enumerate(completions)]
        self.processes.broadcast({"do": "end", "completions": packed})
        return completions


# --- weights on their way to the engine -----------------------------------------------------------


class AnnouncedPolicy(Policy):
    """What an engine needs of a sharded policy: each call is broadcast, and all ranks make it."""

    def __init__(self, policy: Policy, processes: Processes) -> None:
        self.model = policy.model
        self.policy = policy
        self.processes = processes
        self.temperature = policy.temperature
        self.device = policy.device

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.processes.broadcast({"do": "weights"})
        yield from self.policy.named_weights()

    def score(
        self,
        prompts: Ragged,
        completions: Ragged,
        *,
        kept: Ragged | None = None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> Scores:
        sequences = [prompts, completions, *([kept] if kept is not None else [])]
        parts = [part.tolist() for each in sequences for part in (each.values, each.lengths)]
        self.processes.broadcast({"do": "score", "of": parts})
        return self.policy.score(prompts, completions, kept=kept, on_poll=on_poll)


def follow_rank0(policy: Policy, processes: Processes) -> dict[str, Any]:
    """Make the calls that rank 0 broadcasts until its engine is done; what it says at the end."""
    while True:
        command = processes.broadcast(None)
        if command["do"] == "end":
            return command
        if command["do"] == "weights":
            for _ in policy.named_weights():
                pass
        elif command["do"] == "score":
            parts = [torch.tensor(part, dtype=torch.int64) for part in command["of"]]
            prompts, completions, *kept = map(Ragged, parts[::2], parts[1::2])
            policy.score(prompts, completions, kept=kept[0] if kept else None)
        else:
            raise MainRankFailed


@dataclass(eq=False)
class CopiedEngine(LocalEngine):
    """Generation by an unsharded copy of the model on rank 0."""

    engine: RolloutEngine  # whose policy is `copy`
    copy: Policy
    source: AnnouncedPolicy

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        return self.engine.generate(requests, sampling, observer)

    @torch.no_grad()
    def sync(self, version: int) -> dict[str, float]:
        ours = self.copy.model.state_dict()
        for name, weight in self.source.named_weights():
            ours[name].copy_(weight)
        return self.engine.sync(version)
