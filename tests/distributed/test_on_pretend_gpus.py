"""Updates of a sharded policy on two pretend GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from several_processes import run_processes


@pytest.mark.slow
def test_a_sharded_policy_learns_as_one_on_the_cpu() -> None:
    for found in run_processes(2, Path(__file__).with_name("pretend_gpu_worker.py")):
        for case in found.values():
            assert case["devices"] == ["cuda:0"]
        assert found["float32"]["losses"] < 1e-6 and found["float32"]["gradients"] < 1e-5
        assert found["bfloat16"]["losses"] < 2e-2 and found["bfloat16"]["gradients"] < 0.1
