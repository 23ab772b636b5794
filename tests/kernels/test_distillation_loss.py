"""Distillation over the whole vocabulary: closed forms, float64 autograd, memory.

The expected numbers of the single row were computed in float64 from the definitions, apart from
this package.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from exgrpo_kernels import (
    linear_distillation_loss,
    linear_distillation_loss_reference,
    runtime,
)

F64 = torch.float64
POLICY, TEACHER = [1.0, 0.2, -0.5, -1.5], [0.3, 0.9, -0.2, -2.0]
ROW = {
    "reverse": (0.20371773, [0.28215977, -0.23174963, -0.06421437, 0.01380424]),
    "jsd": (0.04970013, [0.06842361, -0.05894091, -0.01343967, 0.00395696]),
}


def head_of(logits: list[float]) -> Tensor:
    """[V, 1]: with a hidden state of 1 its gradient is that of the logits."""
    return torch.tensor(logits, dtype=F64)[:, None]


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_one_row_in_closed_form(divergence) -> None:
    one, weight = torch.ones(1, 1, dtype=F64), head_of(POLICY).requires_grad_()
    made = linear_distillation_loss(
        one,
        weight,
        one,
        head_of(TEACHER),
        weights=torch.ones(1, dtype=F64),
        divergence=divergence,
    )
    made.loss.backward()
    p, t = (head_of(z).flatten().softmax(0) for z in (POLICY, TEACHER))
    value, gradient = ROW.get(divergence, (0.20165443, (p - t).tolist()))
    assert made.loss.item() == pytest.approx(value, abs=6e-9)
    assert made.divergence.item() == pytest.approx(value, abs=6e-9)
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx(gradient, abs=6e-9)


def batch(dtype: torch.dtype = torch.float32, num_rows: int = 13) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(num_rows, generator=g)
    weights[::4] = 0.0
    return {
        "hidden": torch.randn(num_rows, 8, generator=g).to(dtype),
        "weight": torch.randn(67, 8, generator=g).to(dtype),
        "teacher_hidden": torch.randn(num_rows, 5, generator=g).to(dtype),
        "teacher_weight": torch.randn(67, 5, generator=g).to(dtype),
        "weights": weights,
    }


def outputs(function: Any, given: dict[str, Tensor], dtype: torch.dtype | None = None, **more):
    tensors = {k: v if dtype is None else v.to(dtype) for k, v in given.items()}
    leaves = {k: tensors[k].clone().requires_grad_() for k in ("hidden", "weight")}
    made = function(**(tensors | leaves), **more)
    (3.0 * made.loss).backward()
    return [made.loss.detach(), made.divergence, leaves["hidden"].grad, leaves["weight"].grad]


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 1, 4])
def test_loss_and_gradients_equal_float64_autograd(divergence, dtype, rows) -> None:
    settings = {"divergence": divergence, "mixture": 0.3, "temperature": 0.7}
    given = batch(dtype)
    ours = outputs(linear_distillation_loss, given, chunk_rows=rows, **settings)
    exact = outputs(linear_distillation_loss_reference, given, F64, **settings)
    plain = outputs(linear_distillation_loss_reference, given, **settings)
    for value, peer, truth in zip(ours, plain, exact, strict=True):
        trained = given["weights"] != 0
        if value.shape == trained.shape:  # a silent row's divergence is that of hidden states of 0
            value, peer, truth = value[trained], peer[trained], truth[trained]
        error, off = ((v.double() - truth).abs().max().item() for v in (value, peer))
        size = max(1.0, truth.abs().max().item())
        low = torch.finfo(value.dtype).eps if value.dtype == torch.bfloat16 else 0.0
        assert error <= 2 * off + (1e-6 + low) * size


def test_rows_of_weight_0_are_silent_whatever_they_hold() -> None:
    clean = batch()
    dirty = {name: value.clone() for name, value in clean.items()}
    dirty["hidden"][::4], dirty["teacher_hidden"][::4] = math.nan, math.inf
    for ours, theirs in zip(
        outputs(linear_distillation_loss, dirty),
        outputs(linear_distillation_loss, clean),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_teacher_that_agrees_gives_nothing() -> None:
    given = batch()
    given |= {"teacher_hidden": given["hidden"], "teacher_weight": given["weight"]}
    loss, divergence, *gradients = outputs(linear_distillation_loss, given)
    assert abs(loss.item()) < 1e-5 and divergence.abs().max() < 1e-5
    assert all(g.abs().max() < 1e-5 for g in gradients)


def test_no_rows_and_no_gradients() -> None:
    loss, divergence, hidden, weight = outputs(linear_distillation_loss, batch(num_rows=0))
    assert loss.item() == 0.0 and len(divergence) == 0
    assert hidden.shape == (0, 8) and torch.count_nonzero(weight) == 0
    assert not linear_distillation_loss(**batch()).loss.requires_grad  # pyright: ignore


def test_logits_exist_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    into = runtime.logits_into

    def watched(out, hidden, weight) -> None:
        nonlocal largest
        largest = max(largest, len(out))
        into(out, hidden, weight)

    monkeypatch.setattr(runtime, "logits_into", watched)
    outputs(linear_distillation_loss, batch(num_rows=40), chunk_rows=7)
    assert largest == 7


def test_bad_arguments_are_named() -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(ValueError) as raised:
            linear_distillation_loss(**{**batch(), **changes})  # pyright: ignore
        return str(raised.value)

    assert "reverse, forward, jsd" in refused(divergence="kl")
    assert refused(mixture=1.0) == "mixture must lie in (0, 1), got 1.0"
    assert "13 rows and 67 tokens" in refused(teacher_weight=torch.randn(66, 5))
    assert "weights must have shape [13]" in refused(weights=torch.ones(12))
