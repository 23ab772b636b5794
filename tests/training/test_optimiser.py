"""The optimiser against torch's own, its schedules, and the guard before the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exgrpo_fast.training.optim.optimiser import (
    Optimiser,
    constant,
    linear_warmup,
    warmup_then_decay,
)


def matrix_and_vector() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]


def give_gradients(parameters: list[nn.Parameter], scale: float = 0.01) -> None:
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.grad = scale * torch.randn_like(parameter)


def test_schedules() -> None:
    assert [constant(i) for i in (0, 7)] == [1.0, 1.0]
    assert [linear_warmup(4)(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [linear_warmup(0)(i) for i in (0, 1)] == [1.0, 1.0]
    decay = warmup_then_decay(2, 8)
    assert [decay(i) for i in range(9)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("scale", [0.01, 10.0])  # below and above the clipping norm of 1
def test_two_steps_equal_torch(scale: float) -> None:
    ours, theirs = matrix_and_vector(), matrix_and_vector()
    optimiser = Optimiser(ours, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    reference = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.1,
        weight_decay=0.2,
        betas=(0.8, 0.9),
    )
    for _ in range(2):
        give_gradients(ours, scale)
        give_gradients(theirs, scale)
        norm = torch.cat([p.grad.flatten() for p in theirs]).norm()  # pyright: ignore
        nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        outcome = optimiser.step()
        assert outcome.grad_norm == pytest.approx(float(norm))
        assert (outcome.lr, outcome.skipped) == (0.1, None)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
        assert mine.grad is None


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = matrix_and_vector()
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    Optimiser(parameters, lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(parameters[0], before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(parameters[1], before[1])


def test_the_rate_follows_the_schedule_of_applied_updates() -> None:
    parameters = matrix_and_vector()
    optimiser = Optimiser(parameters, lr=1.0, schedule=linear_warmup(4), skip_grad_norm=100.0)
    rates = []
    for scale in (0.01, 1e6, 0.01):  # the second is refused: it does not count
        give_gradients(parameters, scale)
        rates.append(optimiser.step().lr)
    assert rates == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (float("nan"), "update_not_finite"),
        (float("inf"), "update_not_finite"),
        (1e4, "update_gradient_too_large"),
    ],
)
def test_a_bad_gradient_changes_nothing(bad: float, reason: str) -> None:
    parameters = matrix_and_vector()
    optimiser = Optimiser(parameters, lr=0.1, skip_grad_norm=500.0)
    give_gradients(parameters)
    optimiser.step()
    before = [p.detach().clone() for p in parameters]
    state = {k: {n: t.clone() for n, t in m.items()} for k, m in moments(optimiser).items()}
    give_gradients(parameters)
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = bad
    assert optimiser.step().skipped == reason
    assert optimiser.num_updates == 1
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert all(
        torch.equal(moments(optimiser)[k][n], t) for k, m in state.items() for n, t in m.items()
    )
    assert all(p.grad is None for p in parameters)


def moments(optimiser: Optimiser) -> dict[str, dict[str, torch.Tensor]]:
    return optimiser.state_dict()["moments"]


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    whole, halves = matrix_and_vector(), matrix_and_vector()
    first = Optimiser(whole, lr=0.1, schedule=linear_warmup(5))
    for _ in range(4):
        give_gradients(whole)
        first.step()
    early, late = (Optimiser(halves, lr=0.1, schedule=linear_warmup(5)) for _ in range(2))
    for optimiser in (early, late):
        if optimiser is late:
            late.load_state_dict(early.state_dict())
        for _ in range(2):
            give_gradients(halves)
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
