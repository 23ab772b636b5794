"""A frozen rank is detected by the previous rank, a hung main thread by its own rank."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch.distributed as dist

from exgrpo_fast.core.heartbeat import Heartbeat
from exgrpo_fast.core.torchrun import RankInfo
from exgrpo_fast.run.rank_watch import LOOKS, LOOKS_TO_FREEZE, RankWatch

DEADLINE = 300.0


class Ranks:
    """Three ranks of one store that look in turn."""

    def __init__(self, agents: tuple[str | None, ...] = ("0", "0", "1")) -> None:
        self.store = dist.HashStore()
        self.heartbeats = [Heartbeat() for _ in agents]
        self.watches = [
            RankWatch(
                RankInfo(rank, len(agents), rank),
                self.store,
                deadline=DEADLINE,
                heartbeat=self.heartbeats[rank],
                agent=agent,
            )
            for rank, agent in enumerate(agents)
        ]

    def look(self, times: int, *ranks: int, beating: bool = True) -> list[str | None]:
        """What the last of `times` looks finds, by rank of `ranks`; all earlier ones find nothing."""
        found: list[str | None] = []
        for _ in range(times):
            assert not any(found), found
            for rank in ranks:
                if beating:
                    self.heartbeats[rank]._write()
            found = [self.watches[rank].look() for rank in ranks]
        return found


def test_the_rank_before_a_frozen_one_finds_it() -> None:
    ranks = Ranks()
    assert ranks.look(50, 0, 1, 2) == [None, None, None]
    assert ranks.look(LOOKS_TO_FREEZE, 0, 2) == [None, None]  # the first of them brings news
    assert ranks.look(1, 0, 2) == ["rank 1 is frozen: no sign of life for 120 s", None]


def test_the_first_rank_is_watched_by_the_last() -> None:
    ranks = Ranks()
    assert ranks.look(LOOKS_TO_FREEZE, 1, 2) == [None, None]
    assert ranks.look(1, 1, 2) == [None, "rank 0 is frozen: no sign of life for 120 s"]


def test_a_rank_that_has_ended_is_not_frozen() -> None:
    ranks = Ranks()
    ranks.watches[1].end()
    assert ranks.look(3 * LOOKS_TO_FREEZE, 0, 2) == [None, None]


def test_a_main_thread_without_progress_is_found_by_its_own_rank() -> None:
    ranks = Ranks()
    ranks.look(1, 1)
    ranks.heartbeats[1]._phases.append("update")
    ranks.heartbeats[1]._write()
    assert ranks.look(LOOKS, 1, 0, 2, beating=False) == [None, None, None]  # the first is a beat
    (line,) = ranks.look(1, 1, beating=False)
    assert line == "rank 1 hangs: no progress for 300 s in phase update"


def test_loading_has_six_times_the_patience() -> None:
    ranks = Ranks()
    assert ranks.look(6 * LOOKS - 1, 0, 1, 2, beating=False) == [None, None, None]
    assert ranks.look(1, 2, beating=False) == [
        "rank 2 hangs: no progress for 1800 s in phase start"
    ]


def test_a_rank_that_waits_for_another_does_not_hang() -> None:
    ranks = Ranks()
    with contextlib.ExitStack() as collective:
        for heartbeat in ranks.heartbeats:
            collective.enter_context(heartbeat.waiting())
        assert ranks.look(20 * LOOKS, 0, 1, 2, beating=False) == [None, None, None]
    assert ranks.look(6 * LOOKS, 0, 1, 2, beating=False) == [None, None, None]  # leaving is a beat


@pytest.mark.parametrize(("agents", "is_killed"), [(("0", "0"), True), (("0", "1"), False)])
def test_only_a_process_of_the_same_torchrun_is_killed(
    agents: tuple[str, str], is_killed: bool
) -> None:
    """Elsewhere the number may be that of any process."""
    ranks = Ranks(agents)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as frozen:
        ranks.store.set("1", f"7 {agents[1]} {frozen.pid}")
        ranks.look(2, 0)
        ranks.watches[0].kill_frozen()
        assert frozen.poll() is None
        ranks.look(LOOKS_TO_FREEZE - 1, 0)
        ranks.watches[0].kill_frozen()
        if not is_killed:
            frozen.communicate(b"\n", timeout=60)
    assert frozen.returncode == (-9 if is_killed else 0)
