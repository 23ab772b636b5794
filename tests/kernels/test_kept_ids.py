"""Log-probabilities over the set that top-k, top-p or min-p kept, and the loss on them.

The expected numbers of single rows were computed in float64 from the definition, apart from this
package.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from cases import F64, Case, check_logprob, check_policy_loss, random_case
from torch import Tensor

from exgrpo_kernels import linear_logprob, linear_policy_loss

# logits, target, kept ids -> log pi, log-prob over the set; its gradient in z; entropy over the set
ROWS = [
    (
        [2.0, 1.0, 0.0, -1.0, -2.0],
        1,
        [0, 1, 2],
        (-1.45191440, -1.40760596),
        [-0.66524096, 0.75527153, -0.09003057, 0.0, 0.0],
        0.83239558,
    ),
    (
        [0.5, 0.4, 0.3, 0.2, 0.1],
        2,
        [2, 0, 1, -1],
        (-1.61941633, -1.20194285),
        [-0.36716540, -0.33222499, 0.69939039, 0.0, 0.0],
        1.09528727,
    ),
]


def one_row(logits: list[float]) -> tuple[Tensor, Tensor]:
    """A hidden state and a head whose logits are these: its gradient is that of the logits."""
    return torch.ones(1, 1, dtype=F64), torch.tensor(logits, dtype=F64)[:, None].requires_grad_()


@pytest.mark.parametrize(("logits", "target", "ids", "logprobs", "gradient", "entropy"), ROWS)
def test_a_row_over_its_kept_set(logits, target, ids, logprobs, gradient, entropy) -> None:
    hidden, weight = one_row(logits)
    targets, kept = torch.tensor([target]), torch.tensor([ids])
    whole = linear_logprob(hidden, weight, targets)
    made = linear_logprob(hidden, weight, targets, kept_ids=kept)
    assert whole.logprobs.item() == pytest.approx(logprobs[0], abs=6e-9)
    assert made.logprobs.item() == pytest.approx(logprobs[1], abs=6e-9)
    assert made.entropy.item() == pytest.approx(entropy, abs=6e-9)
    (found,) = torch.autograd.grad(made.logprobs.sum(), weight)
    assert found.flatten().tolist() == pytest.approx(gradient, abs=6e-9)


def test_a_set_of_one_is_certain_and_has_no_gradient() -> None:
    hidden, weight = one_row([0.3, -0.2, 0.9])
    result = linear_policy_loss(
        hidden,
        weight,
        torch.tensor([1]),
        kept_ids=torch.tensor([[1, -1]]),
        advantages=torch.ones(1, dtype=F64),
        behaviour_logprobs=torch.zeros(1, dtype=F64),
        weights=torch.ones(1, dtype=F64),
    )
    result.backward()
    assert result.logprobs.item() == 0.0 and result.ratio.item() == 1.0
    assert weight.grad is not None and torch.count_nonzero(weight.grad) == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("objective", ["clip", "everything", "k3_ratio", "gspo", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_equals_float64_autograd(backend, objective, dtype) -> None:
    case = Case(seed=3, objective=objective, num_rows=7, dtype=dtype, kept=9, bias="absent")
    check_policy_loss(case, backend)
    check_logprob(case, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_random_cases(backend) -> None:
    rng = random.Random(5)
    for _ in range(40):
        case = random_case(rng, "policy_loss")
        if case.softcap is None:
            check_policy_loss(replace(case, kept=rng.choice([1, 2, 9])), backend)


def refused(**changes) -> str:
    arguments = {"hidden": torch.randn(2, 3), "weight": torch.randn(5, 3)}
    arguments |= {"targets": torch.tensor([1, 4]), "kept_ids": torch.tensor([[1, 2], [4, -1]])}
    with pytest.raises(ValueError) as raised:
        linear_logprob(**arguments | changes)  # pyright: ignore[reportArgumentType]
    return str(raised.value)


def test_bad_sets_are_named() -> None:
    assert refused(kept_ids=torch.tensor([1, 4])) == "kept_ids must have shape [2, K], got [2]"
    assert "int32 or int64" in refused(kept_ids=torch.ones(2, 2))
    assert "lie in [-1, 5)" in refused(kept_ids=torch.tensor([[1, 5], [4, 0]]))
    assert "hold the target" in refused(kept_ids=torch.tensor([[1, 2], [3, -1]]))
    assert "hold the target" in refused(kept_ids=torch.tensor([[1, 2], [-1, 4]]))
    assert "softcap" in refused(softcap=3.0)
