"""The rank and world size that torchrun sets in the environment, read without loading torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from exgrpo_fast.core.errors import UserError


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
    """Of this process; SINGLE where torchrun did not start it. UserError for numbers that are none."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return SINGLE
    try:
        rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return RankInfo(rank, count, int(environment.get("LOCAL_RANK", rank)))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK of the environment: {error}") from None


def refuse_missing_address(environment: Mapping[str, str] = os.environ) -> None:
    """UserError where RANK and WORLD_SIZE are set, but not by torchrun."""
    if place_of(environment).count > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise UserError(
            "RANK and WORLD_SIZE are set, and MASTER_ADDR or MASTER_PORT is not: start the processes "
            "with torchrun, or unset these variables for a run of one process"
        )
