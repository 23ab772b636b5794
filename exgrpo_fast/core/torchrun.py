"""What torchrun tells each of its processes, read from the environment without loading torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Which process of a run this is. `local`: among those of the same machine, and its GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ONLY = Place()


def place_of(environment: Mapping[str, str] = os.environ) -> Place:
    """Of this process; one of one where torchrun did not start it."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ONLY
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    return Place(rank, count, int(environment.get("LOCAL_RANK", rank)))
