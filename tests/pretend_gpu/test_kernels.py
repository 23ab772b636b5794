"""The fused losses on the pretend GPU, their Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Outputs, check_policy_loss, make_batch, run_loss
from pretend_gpu.machine import pretend_gpu

from exgrpo_kernels import linear_policy_loss, runtime

OBJECTIVES = ["clip", "everything", "gspo_sapo"]


def outputs(case: Case, **settings: object) -> Outputs:
    found = run_loss(linear_policy_loss, make_batch(case), case, None, **settings)
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bits_are_those_of_the_interpreter_on_the_cpu(objective: str) -> None:
    sizes = {"num_rows": 40, "masked": 0.3, "shaped": True, "objective": objective}
    expected = outputs(Case(**sizes), backend="triton")
    with pretend_gpu():
        found = outputs(Case(**sizes, device="cuda"))  # "auto" is Triton there
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_bfloat16_keeps_the_rule_of_the_losses(logits_dtype: torch.dtype | None) -> None:
    """The products with `out_dtype`, which no CPU runs otherwise."""
    case = Case(
        objective="everything",
        num_rows=20,
        masked=0.3,
        dtype=torch.bfloat16,
        logits_dtype=logits_dtype,
        device="cuda",
    )
    with pretend_gpu():
        check_policy_loss(case, "triton")


def test_the_sparse_backward_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 256)
    case = Case(num_rows=150, num_tokens=300, dtype=torch.bfloat16, silent=0.5, device="cuda")
    with pretend_gpu() as gpu:
        batch = make_batch(case)
        columns = {k: c for k, c in batch.columns.items() if k != "sequence_ids"}
        hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
        with gpu.waits.during() as waits:
            linear_policy_loss(hidden, weight, batch.targets, **columns).loss.backward()
    assert len(waits) == 0, waits.report()
