"""Optimisers on shards make the updates of one process, and go on with another number of them.

flash_adamw is the real one, whose kernels run in Triton's interpreter on pretend GPUs. adamw_8bit rounds
bfloat16 weights at random; here each weight by the same bits on any number of processes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import run_processes

WORKER = Path(__file__).with_name("optimiser_worker.py")


def needs(kind: str, package: str) -> Any:
    absent = importlib.util.find_spec(package) is None
    why = f"needs {package}, of the extra `optim8`"
    return pytest.param(kind, marks=pytest.mark.skipif(absent, reason=why))


KINDS = ["adamw", needs("adamw_8bit", "torchao"), needs("flash_adamw", "flashoptim")]


SHARDED = ((2, 2), (3, 3), (1, 3), (3, 2))  # processes that wrote a checkpoint, that go on from it


def exact(kind: str, counts: tuple[int, int]) -> set[int]:
    """Places of the parameters whose shards have the blocks of the whole, or none. torch's AdamW for CPUs
    computes the last weights of a tensor without vectors, with other roundings."""
    if kind == "adamw":
        return set()
    if kind == "flash_adamw":
        return {0, 1}
    return {0, 2, 3} if 3 in counts else {0, 1, 2, 3}


def furthest(ours: dict[str, Any], expected: dict[str, Any]) -> list[float]:
    """Of each parameter, in steps of the learning rate."""
    pairs = zip(ours["weights"], expected["weights"], strict=True)
    return [float((torch.tensor(a) - torch.tensor(b)).abs().max()) / 1e-3 for a, b in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_makes_the_same_updates(kind: str, tmp_path: Path) -> None:
    """Weights, residuals and moments bit for bit; where blocks begin elsewhere, within their 8 bits."""
    (whole,) = run_processes(1, WORKER, kind, "write", str(tmp_path / "1"))
    assert whole["kinds"].count("OptimState8bit") == (2 if kind == "adamw_8bit" else 0)
    for wrote, reads in SHARDED:
        what = "write" if wrote == reads else "read"
        for found in run_processes(reads, WORKER, kind, what, str(tmp_path / str(wrote))):
            for place in exact(kind, (wrote, reads)):
                assert found["digests"][place] == whole["digests"][place], (wrote, reads, place)
            bound = 1e-3 if kind == "adamw" else 0.5
            assert max(furthest(found, whole)) <= bound, (wrote, reads)


@pytest.mark.parametrize("kind", [needs("adamw_8bit", "torchao")])
@pytest.mark.parametrize("count", [2, 3])
def test_bfloat16_weights_on_shards_differ_by_their_rounding(count: int, kind: str) -> None:
    """It rounds at random; a norm's weights are about 1, where two steps of bfloat16 are 2^-6."""
    for found in run_processes(count, WORKER, kind, "train"):
        assert found["dtypes"] == ["torch.bfloat16"]
        assert max(found["losses"]) <= 1e-3 and max(found["norms"]) <= 0.05
        assert found["weights"] <= 2**-6
