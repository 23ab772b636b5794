"""Two processes that share the weights and the packs learn what one learns alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several_processes import run_processes

WORKER = Path(__file__).with_name("learner_worker.py")
FLOAT32 = (
    "tied",
    "untied",
    "checkpointing",
    "offloading",
    "tiles",
    "tiles and checkpointing",
    "tiles beside whole packs",
    "adapters",
    "adapters and checkpointing",
    "adapters and tiles",
)


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run_processes(2, WORKER)


@pytest.mark.parametrize("case", FLOAT32)
def test_losses_gradients_and_weights_are_those_of_one_process(reports, case: str) -> None:
    for report in reports:
        found = report[case]
        assert found["clipped"], "the gradients were not clipped"
        for what in ("losses", "norms", "gradients"):
            assert max(found[what]) <= 1e-6, (what, found[what])
        for what in ("metrics", "scores"):
            assert found[what] <= 1e-5, what
        # AdamW divides by the root of tiny second moments
        assert found["weights"] <= 1e-4


@pytest.mark.parametrize("case", ["bfloat16", "bfloat16 tiles", "bfloat16 adapters"])
def test_in_bfloat16_they_differ_by_its_rounding(reports, case: str) -> None:
    for report in reports:
        assert max(report[case]["losses"]) <= 1e-2
        assert max(report[case]["gradients"]) <= 0.05


def test_what_one_process_finds_broken_is_refused_by_all(reports) -> None:
    for report in reports:
        assert report["broken"] == {"skipped": {"update_not_finite": 1}, "same": True}


def test_a_device_that_is_too_small_ends_the_rehearsal_of_all() -> None:
    first, second = run_processes(2, WORKER, "too little memory")
    assert second.startswith("DoesNotFit: preflight: 24 completions of 16 tokens do not fit (CUDA")
    assert first.startswith("RankLost: ")


def test_a_process_without_a_pack_keeps_company(reports) -> None:
    for report in reports:
        assert report["few"]["loss"] <= 1e-6 and report["few"]["tokens"] > 0


@pytest.mark.parametrize("case", ["synced", "synced adapters"])
def test_the_engine_of_the_first_process_follows_the_weights_in_parts(reports, case: str) -> None:
    first, second = (report[case] for report in reports)
    assert first["same"] and 0.0 < first["gap"] == second["gap"] < 1e-4
    assert first["tokens"] == second["tokens"] and len(first["tokens"]) == 3
