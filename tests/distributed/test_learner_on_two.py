"""Two processes that share the weights and the packs learn what one learns alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several_processes import run_processes
from torch.distributed.fsdp import FSDPModule

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
    "kept sets",
    "distillation",
    "distillation and adapters",
    "adapters with dropout",
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


CAN_LEAVE = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot leave a pass"
)


@CAN_LEAVE
def test_a_device_that_is_too_small_ends_the_rehearsal_of_all() -> None:
    first, second = run_processes(2, WORKER, "too little memory")
    said = "DoesNotFit: preflight: 24 completions of 16 tokens do not fit "
    assert second.startswith(f"{said}(CUDA out of memory")
    assert first.startswith(f"{said}(out of memory on another rank")


@CAN_LEAVE
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_repeat_a_batch_for_which_one_has_no_memory(count: int) -> None:
    for report in run_processes(count, WORKER, "full"):
        for where, found in report.items():
            assert found["left"] == 0, "memory did not run out"
            assert found["sizes"] == {"microbatch": [60, 30], "chunk_rows": [None, 30]}
            assert found["halvings"] == [[1, 1], [0, 0]] or where == "scoring"
            for what in ("losses", "gradients", "scores"):
                assert found[what] <= 1e-6, (where, what, found[what])


def test_a_process_without_a_pack_keeps_company(reports) -> None:
    for report in reports:
        assert report["few"]["loss"] <= 1e-6 and report["few"]["tokens"] > 0


@pytest.mark.parametrize("case", ["synced", "synced adapters"])
def test_the_engine_of_the_first_process_follows_the_weights_in_parts(reports, case: str) -> None:
    first, second = (report[case] for report in reports)
    assert first["same"] and 0.0 < first["gap"] == second["gap"] < 1e-4
    assert first["tokens"] == second["tokens"] and len(first["tokens"]) == 3
    assert first["kept"] == second["kept"] and len(first["kept"]) == 3
    assert 1 <= min(min(counts) for _, counts in first["kept"])
    assert max(max(counts) for _, counts in first["kept"]) <= 3
    assert max(first["cut gap"], second["cut gap"]) < 1e-5
