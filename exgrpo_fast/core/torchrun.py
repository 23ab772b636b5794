"""The rank and world size that torchrun sets in the environment, read without loading torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """`count`: the world size; `local`: the rank on this machine, and the index of its GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


SINGLE = RankInfo()


def place_of(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Of this process; SINGLE where torchrun did not start it."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return SINGLE
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return RankInfo(rank, count, int(environment.get("LOCAL_RANK", rank)))
