"""Rank 0 generates and broadcasts the completions; all ranks take part in sending the weights.

An engine takes the weights from its policy, and may ask that for scores as well, as often as it
likes. In parts, each of these is work for all processes. So the first one's engine has a policy
that says what it is about to do, and the others do it along until they hear that the engine is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from exgrpo_fast.core.process_group import MainRankFailed, Processes
from exgrpo_fast.core.types import Completion
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy, Scores
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    AsyncEngine,
    Generation,
    LocalEngine,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
)
from exgrpo_fast.rollout.server.wire import pack_completion, unpack_completion


class SharedEngine(AsyncEngine):
    """The engine of the first process, for all of them; the others have none of their own."""

    def __init__(self, engine: RolloutEngine | None, policy: Policy, processes: Processes) -> None:
        """`engine`: made with an `AnnouncedPolicy`; None in all processes but the first."""
        assert (engine is not None) == processes.is_main
        self.engine = engine
        self.policy = policy
        self.processes = processes

    def start(self, requests: Sequence[Request], sampling: Sampling) -> SharedGeneration:
        own = self.engine.start(requests, sampling) if self.engine else None
        return SharedGeneration(own, self.processes)

    def sync(self, version: int) -> dict[str, float]:
        if self.engine is None:
            return help_along(self.policy, self.processes)
        try:
            figures = self.engine.sync(version)
        except BaseException:
            self.processes.broadcast({"do": "give up"})
            raise
        self.processes.broadcast({"do": "end", "figures": figures})
        return figures

    def rest(self) -> None:
        if self.engine:
            self.engine.rest()

    def close(self) -> None:
        if self.engine:
            self.engine.close()


class SharedGeneration:
    """Completions on their way to the first process, and from it to the others."""

    def __init__(self, own: Generation | None, processes: Processes) -> None:
        self.own = own
        self.processes = processes

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        """`observer` is called on rank 0 only."""

        def generate() -> list[Completion]:
            assert self.own is not None
            return self.own.wait(observer)

        return self.processes.run_on_rank0(generate, pack=pack_all, unpack=unpack_all)


def pack_all(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    return [pack_completion(place, each) for place, each in enumerate(completions)]


def unpack_all(entries: Sequence[dict[str, Any]]) -> list[Completion]:
    return [unpack_completion(entry)[1] for entry in entries]


# --- weights on their way to the engine -----------------------------------------------------------


class AnnouncedPolicy(Policy):
    """What an engine needs of a sharded policy; it tells the other processes to do the same."""

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
        self, prompts: Ragged, responses: Ragged, *, on_poll: Callable[[], None] = lambda: None
    ) -> Scores:
        parts = [prompts.values, prompts.lengths, responses.values, responses.lengths]
        self.processes.broadcast({"do": "score", "of": [part.tolist() for part in parts]})
        return self.policy.score(prompts, responses, on_poll=on_poll)


def help_along(policy: Policy, processes: Processes) -> dict[str, float]:
    """Do what the first process announces until its engine has what it needs; its figures."""
    while True:
        told = processes.broadcast(None)
        if told["do"] == "end":
            return told["figures"]
        if told["do"] == "weights":
            for _ in policy.named_weights():
                pass
        elif told["do"] == "score":
            parts = [torch.tensor(part, dtype=torch.int64) for part in told["of"]]
            policy.score(Ragged(parts[0], parts[1]), Ragged(parts[2], parts[3]))
        else:
            raise MainRankFailed


class CopiedEngine(LocalEngine):
    """Transformers' `generate` by a whole copy of the model, which the first process keeps."""

    def __init__(self, engine: RolloutEngine, copy: Policy, source: AnnouncedPolicy) -> None:
        """`engine`: whose policy is `copy`."""
        self.engine = engine
        self.copy = copy
        self.source = source

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
        return {}
