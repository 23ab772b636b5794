"""The head's gradient: summed over packs where it is wanted, rounded as seldom as can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from exgrpo_fast.model.head_gradient import summed_in_place
from exgrpo_kernels import PolicyObjective, linear_policy_loss

ROWS, WIDTH, VOCABULARY = 24, 16, 40


def packs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def head(dtype: torch.dtype) -> nn.Parameter:
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(weight.to(dtype))


def summed(weight: nn.Parameter, hidden: list[Tensor], in_place: bool) -> Tensor:
    """The gradient after all packs, with that of a tied embedding between them."""
    for hidden_ND in hidden:
        context = summed_in_place(weight) if in_place else None
        columns = {
            "advantages": torch.linspace(-1, 1, ROWS),
            "behaviour_logprobs": torch.full((ROWS,), -3.0),
            "weights": torch.full((ROWS,), 1 / ROWS),
        }
        arguments = {"objective": PolicyObjective(), **columns}
        given, targets = hidden_ND.requires_grad_(), torch.arange(ROWS)
        if context is None:
            result = linear_policy_loss(given, weight, targets, **arguments)
        else:
            with context as main_grad:
                result = linear_policy_loss(
                    given, weight, targets, weight_main_grad=main_grad, **arguments
                )
        (result.loss + weight[3].sum().to(result.loss.dtype)).backward()
    assert weight.grad is not None
    return weight.grad


def test_float32_is_what_autograd_sums() -> None:
    plain = summed(head(torch.float32), packs(torch.float32), in_place=False)
    ours = summed(head(torch.float32), packs(torch.float32), in_place=True)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_float32_needs_no_sum_beside_the_gradient() -> None:
    weight = head(torch.float32)
    with summed_in_place(weight) as first:
        pass
    with summed_in_place(weight) as second:
        assert first is weight.grad is second


def test_bfloat16_is_as_exact_as_with_autograd() -> None:
    hidden = packs(torch.bfloat16)
    wide = nn.Parameter(head(torch.bfloat16).detach().double())
    exact = summed(wide, [h.double() for h in hidden], in_place=False)
    errors = {}
    for in_place in (False, True):
        made = summed(head(torch.bfloat16), packs(torch.bfloat16), in_place=in_place)
        assert made.dtype == torch.bfloat16
        errors[in_place] = float((made.double() - exact).norm() / exact.norm())
    assert 0 < errors[True] <= errors[False] < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gets_none(dtype: torch.dtype) -> None:
    weight = head(dtype).requires_grad_(False)
    with summed_in_place(weight) as main_grad:
        assert main_grad is None
    assert weight.grad is None


def test_a_loss_that_is_refused_leaves_no_rounded_part() -> None:
    weight = head(torch.bfloat16)
    with pytest.raises(RuntimeError), summed_in_place(weight) as main_grad:
        assert main_grad is not None
        main_grad.add_(1.0)
        raise RuntimeError
    assert weight.grad is not None and not weight.grad.any()
