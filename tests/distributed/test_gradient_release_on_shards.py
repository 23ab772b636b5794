"""Released gradients of several processes make the usual updates of one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from several_processes import run_processes
from torch.distributed.fsdp import FSDPModule

WORKER = Path(__file__).with_name("release_worker.py")
COUNTS = (2, pytest.param(3, marks=pytest.mark.slow))
CASES = (
    "tied",
    "untied",
    "tied checkpointing",
    "untied checkpointing",
    "tiles",
    "offloading",
    "few",
)
CAN_LEAVE = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot leave a pass"
)


@pytest.fixture(scope="module", params=COUNTS)
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_processes(request.param, WORKER)


@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_usual_ones_of_one_process(reports, case: str) -> None:
    """The one process reads many packs; the steps are those of plain gradient descent."""
    for report in reports:
        found = report[case]
        assert found["clipped"], "the gradients were not clipped"
        for what in ("losses", "norms", "gradients", "weights"):
            assert found[what] <= 1e-6, (what, found[what])


def test_adamw_makes_no_more_of_it_than_of_a_sum_in_another_order(reports) -> None:
    """It divides by the root of tiny second moments."""
    for report in reports:
        assert max(report["adamw"][what] for what in ("losses", "norms")) <= 1e-5
        assert report["adamw"]["weights"] <= 2e-3


def test_on_the_same_packs_weights_are_the_usual_ones_bit_for_bit(reports) -> None:
    for report in reports:
        assert report["bits"] == [True, True]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_moments_of_8_bits_as_well() -> None:
    assert run_processes(2, WORKER, "adamw_8bit") == [True, True]


def test_two_gradients_live_at_a_time(reports) -> None:
    """The head's, and one other; all of them are handed out twice."""
    for report in reports:
        for case in CASES:
            found, updates = report[case], 3
            assert found["live"] == 2
            hooked = found["parameters"] - ("untied" in case or case == "offloading")
            assert found["hooks"] == 2 * updates * hooked


def test_each_rank_reads_one_pack_and_some_have_none(reports) -> None:
    for case in ("tied", "few"):
        packs = [report[case]["packs"] for report in reports]
        assert all(len(of_update) == 1 for of_rank in packs for of_update in of_rank)
    counted = [sum(counts) for counts in zip(*map(flat, packs), strict=True)]
    assert counted[0] < len(reports) and counted[2] < len(reports), "no rank was without a pack"
    assert counted[1] >= 2, "packs are even"


def flat(of_updates: list[list[bool]]) -> list[bool]:
    return [counts for (counts,) in of_updates]


@pytest.mark.parametrize("where", ["hidden states", "gradients"])
def test_what_is_not_finite_on_one_rank_is_refused_by_all(reports, where: str) -> None:
    for report in reports:
        found = report[f"refused: {where}"]
        assert found == {"skipped": {"update_not_finite": 1}, "same": True, "counted": 0}


@CAN_LEAVE
def test_out_of_memory_on_one_rank_is_answered_by_all(reports) -> None:
    """Once: smaller chunks of logits. Again: nothing is left to part."""
    for report in reports:
        once = report["first 1"]
        assert once["left"] == 0 and once["halvings"] == [1, 0]
        assert max(once["losses"], once["norms"]) <= 1e-6
        again = report["first 9"]["error"]
        assert again.startswith("OutOfMemory: out of memory in the update: train.gradient_release")
        half = report["second 1"]["error"]
        assert half.startswith("HalfApplied: out of memory in the second pass of train.gradient_")
    assert "on another rank" in reports[0]["second 1"]["error"]


def test_what_cannot_be_released_is_refused_by_all_and_changes_nothing(reports) -> None:
    for report in reports:
        assert report["too many"].startswith("SeveralPacks: train.gradient_release: an update")
        assert "one on each rank; raise" in report["too many"]
