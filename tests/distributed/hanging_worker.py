"""Two ranks, of which the second hangs in an update. Usage: hanging_worker.py RANK COUNT STORE"""

from __future__ import annotations

import sys
import threading

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.process_group import RankLost, joined
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.run.rank_watch import watched_ranks


def hang() -> None:
    threading.Event().wait()


def main(rank: int, count: int, store: str) -> None:
    place = RankInfo(rank, count, rank)
    with (
        joined(place, "cpu", store=f"file://{store}") as processes,
        watched_ranks(processes, deadline=4.0, log=print),
        HEARTBEAT.phase("update"),
    ):
        if rank == 1:
            hang()
        processes.broadcast("text")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except RankLost as error:
        print(type(error).__name__)
