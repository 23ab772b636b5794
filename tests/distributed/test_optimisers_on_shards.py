"""Optimisers on shards make the updates of one process, and go on with another number of them."""

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


def furthest(ours: dict[str, Any], expected: dict[str, Any]) -> list[float]:
    """Of each parameter, in steps of the learning rate."""
    pairs = zip(ours["weights"], expected["weights"], strict=True)
    return [float((torch.tensor(a) - torch.tensor(b)).abs().max()) / 1e-3 for a, b in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_makes_the_same_updates(kind: str, tmp_path: Path) -> None:
    whole = run_processes(1, WORKER, kind, "write", str(tmp_path / "1"))[0]
    assert whole["kinds"].count("OptimState8bit") == (2 if kind == "adamw_8bit" else 0)
    for count in (2, 3):
        for found in run_processes(count, WORKER, kind, "write", str(tmp_path / str(count))):
            first, second, *small = furthest(found, whole)
            assert max(first, *small) <= 1e-3
            # On three its moments are not quantised: they differ from the whole by 8 bits.
            assert second <= (1e-3 if kind != "adamw_8bit" or count == 2 else 0.5)
    for wrote, reads in ((1, 3), (3, 2)):
        folder = str(tmp_path / str(wrote))
        for found in run_processes(reads, WORKER, kind, "read", folder):
            first, second, *small = furthest(found, whole)
            assert max(first, *small) <= 1e-3, (wrote, reads)
            assert second <= (1e-3 if kind != "adamw_8bit" or 3 not in (wrote, reads) else 0.5)


@pytest.mark.parametrize("kind", [needs("adamw_8bit", "torchao")])
def test_bfloat16_weights_on_shards_differ_by_their_rounding(kind: str) -> None:
    """It rounds at random; a norm's weights are about 1, where two steps of bfloat16 are 2^-6."""
    for found in run_processes(2, WORKER, kind, "train"):
        assert found["dtypes"] == ["torch.bfloat16"]
        assert max(found["losses"]) <= 1e-2 and max(found["norms"]) <= 0.05
        assert found["weights"] <= 2**-6
