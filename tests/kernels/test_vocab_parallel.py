"""A head in parts against the whole head: the same loss, vectors and gradients on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import logit_rounding, make_batch
from several_processes import run_processes
from vocab_parallel_worker import CASE, CASES

from exgrpo_kernels import vocab_parallel_policy_loss

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


@pytest.fixture(scope="module", params=[2, 3])
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of the processes found."""
    return run_processes(request.param, WORKER)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_process_has_the_loss_and_gradients_of_the_whole_head(reports, dtype: str) -> None:
    for report in reports:
        for name in CASES:
            for what in ("loss", "logprob") if name != "dirty" else ("loss",):
                errors = report[f"{what} {name} {dtype}"]
                assert {"loss", "dhidden", "dweight", "logprobs", "entropy"} <= errors.keys()
                worst = max(errors, key=lambda key: errors[key])
                allowed = TOLERANCE[dtype]
                if (name, dtype) == ("certain", "float32"):  # logits of 12 are rounded in that type
                    allowed += 2.0 * logit_rounding(make_batch(CASES[name]))
                assert errors[worst] <= allowed, (what, name, worst, errors[worst])


def test_a_target_belongs_to_exactly_one_process(reports) -> None:
    for report in reports:
        for which in ("nobody's target", "everybody's target"):
            assert "held by exactly one rank" in report[which]


def test_arguments_are_checked_before_anything_is_sent() -> None:
    batch = make_batch(CASE)
    with pytest.raises(ValueError, match="vocab_start"):
        vocab_parallel_policy_loss(
            batch.hidden, batch.weight, batch.targets, vocab_start=-1, **batch.columns
        )
    with pytest.raises(ValueError, match="weight_main_grad"):
        vocab_parallel_policy_loss(
            batch.hidden,
            batch.weight,
            batch.targets,
            vocab_start=0,
            weight_main_grad=torch.zeros(3, 8),
            **batch.columns,
        )
