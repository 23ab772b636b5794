"""One of several processes that talk to each other."""

from __future__ import annotations

import json
import sys

from several_processes import met

from exgrpo_fast.core.process_group import MainRankFailed, Processes, RanksDiverged


def talk(processes: Processes) -> dict[str, object]:
    rank = processes.place.rank
    report: dict[str, object] = {}
    report["broadcast"] = processes.broadcast({"rank": rank, "text": "ä", "tiny": 1e-300})
    report["gathered"] = processes.gather("x" * rank)
    report["all_reduce_max"] = processes.all_reduce_max(rank)
    calls: list[int] = []

    def make() -> int:
        calls.append(rank)
        return 7

    report["made"] = processes.run_on_rank0(make)
    report["calls"] = calls

    def fail() -> int:
        raise KeyError("missing")

    try:
        processes.run_on_rank0(fail)
    except (MainRankFailed, KeyError) as error:
        report["failed"] = type(error).__name__
    processes.require_same("step 3", {"loss": float("nan"), "tokens": 5})
    try:
        processes.require_same("step 3", {"tokens": 5, "loss": rank / 2})
    except RanksDiverged as error:
        report["strayed"] = str(error)
    return report


if __name__ == "__main__":
    with met(sys.argv[1:]) as processes:
        print(json.dumps(talk(processes)))
