"""Objectives as TRL, verl, prime-rl and the papers have them: values and slopes in closed form.

The expected numbers were computed in float64 from the formulas of those sources, apart from this
package. Six tokens of two sequences, or eight by their probabilities.
"""

# Keyword arguments travel in dicts here, and absent gradients fail the tests they are used in.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, policy_loss
from exgrpo_kernels.objective import LossColumns, row_scalars

F64 = torch.float64


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


LOGPROBS = vector(-0.10, -1.20, -0.50, -2.30, -0.05, -3.00)
BEHAVIOUR = vector(-0.30, -1.00, -0.55, -1.60, -0.05, -3.40)
ENGINE = vector(-0.25, -1.10, -0.50, -1.70, -0.10, -3.10)
REFERENCE = vector(-0.60, -0.90, -0.52, -4.00, -0.20, -2.50)
ADVANTAGES = vector(1.0, 1.0, 1.0, 1.0, -0.8, -0.8)
SEQUENCES = torch.tensor([0, 0, 0, 0, 1, 1])
NO_CLIP: dict[str, Any] = {"clip_low": None, "clip_high": None}


def check(
    objective: PolicyObjective,
    loss: float | None,
    c1: list[float],
    *,
    logprobs: Tensor = LOGPROBS,
    behaviour: Tensor = BEHAVIOUR,
    advantages: Tensor = ADVANTAGES,
    weights: Tensor | None = None,
    **columns,
) -> dict[str, Tensor]:
    """The loss and its slopes, by autograd and by `row_scalars`, to eight digits."""
    leaf = logprobs.clone().requires_grad_()
    columns |= {"advantages": advantages, "behaviour_logprobs": behaviour}
    columns["weights"] = torch.ones_like(logprobs) if weights is None else weights
    result = policy_loss(leaf, objective=objective, **columns)
    (slopes,) = torch.autograd.grad(result.loss, leaf)
    assert slopes.tolist() == pytest.approx(c1, abs=6e-9)
    if loss is not None:
        assert result.loss.item() == pytest.approx(loss, abs=6e-9)
    checked = LossColumns(**columns).checked(objective, len(leaf), F64, leaf.device)
    closed, _ = row_scalars(objective, logprobs, torch.zeros_like(logprobs), checked)
    torch.testing.assert_close(closed, slopes, rtol=1e-12, atol=1e-14)
    return result.metrics


# ---- k3 times the ratio: TRL's use_bias_correction_kl --------------------------------------------

K3_RATIO = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.05, "kl_estimator": "k3_ratio"}


def test_k3_ratio():
    metrics = check(
        PolicyObjective(**K3_RATIO),
        -1.53102498,
        [0.03053507, -0.83101171, -1.05021983, -0.45437555, 0.80750000, 1.15616414],
        ref_logprobs=REFERENCE,
    )
    kl = [0.13011684, 0.04082094, 0.00020886, 0.43832767, 0.01070798, 0.22186606]
    assert metrics["kl_ref"].item() == pytest.approx(sum(kl) / 6, abs=6e-9)


def test_k3_ratio_with_a_correction_that_the_kl_does_not_get():
    """The correction multiplies the advantages; in the weights it would scale the KL too."""
    check(
        PolicyObjective(**K3_RATIO),
        -1.82786833,
        [0.03053507, -0.91711838, -0.99894873, -0.50660189, 0.84851688, 0.84684112],
        advantages=ADVANTAGES * (BEHAVIOUR - ENGINE).exp(),
        ref_logprobs=REFERENCE,
    )


def test_k3_ratio_of_a_sequence():
    check(
        PolicyObjective(ratio_level="sequence", **K3_RATIO),
        -1.39191370,
        [-0.82225086, -0.85384290, -0.83813205, -0.80423701, 0.99049697, 0.94237289],
        ref_logprobs=REFERENCE,
        sequence_ids=SEQUENCES,
    )


def test_plain_k3():
    check(
        PolicyObjective(**K3_RATIO | {"kl_estimator": "k3"}),
        -1.51319235,
        [0.01967347, -0.83622369, -1.05028103, -0.45571948, 0.80696460, 1.16102369],
        ref_logprobs=REFERENCE,
    )


def test_k3_ratio_on_policy_is_the_gap():
    check(
        PolicyObjective(kl_coef=1.0, kl_estimator="k3_ratio"),
        None,
        (LOGPROBS - REFERENCE).tolist(),
        behaviour=LOGPROBS,
        advantages=torch.zeros(6, dtype=F64),
        ref_logprobs=REFERENCE,
    )


def test_k3_ratio_has_no_gradient_through_a_clamped_ratio():
    """Beyond the clamp the ratio is a constant, e^20, and k3 keeps its own slope 1 - e^-d."""
    gap = 0.3
    check(
        PolicyObjective(kl_coef=1e-9, kl_estimator="k3_ratio"),
        None,
        [1e-9 * float(vector(20.0).exp()) * (1 - float(vector(-gap).exp()))],
        logprobs=vector(-1.0),
        behaviour=vector(-30.0),
        advantages=vector(0.0),
        ref_logprobs=vector(-1.0 - gap),
    )


# ---- k3+: verl -----------------------------------------------------------------------------------

GAPS = vector(-25.0, -3.0, -1.0, 0.5, 12.0, 25.0)


def kl_alone(estimator: str, c1: list[float], **columns) -> Tensor:
    metrics = check(
        PolicyObjective(kl_coef=1.0, kl_estimator=estimator),
        None,
        c1,
        logprobs=GAPS - 1.0,
        behaviour=GAPS - 1.0,
        advantages=torch.zeros(6, dtype=F64),
        ref_logprobs=torch.full_like(GAPS, -1.0),
        **columns,
    )
    return metrics["kl_ref"]


def test_k3_plus_has_the_slope_of_k2_everywhere():
    mean = kl_alone("k3_plus", [-25.0, -3.0, -1.0, 0.5, 12.0, 25.0])
    # verl bounds the value at 10; ours is that of k3, its gap bounded at 20
    k3 = (-GAPS.clamp(-20, 20)).expm1() + GAPS.clamp(-20, 20)
    assert k3[2:4].tolist() == pytest.approx([0.71828183, 0.10653066], abs=6e-9)
    assert mean.item() == pytest.approx(k3.mean().item(), rel=1e-12)


def test_plain_k3_pulls_beyond_the_nats_where_that_of_verl_stops():
    kl_alone("k3", [0.0, -19.08553692, -1.71828183, 0.39346934, 0.99999386, 0.0])


# ---- DPPO, binary total variation: prime-rl ------------------------------------------------------

P = vector(0.90, 0.60, 0.30, 0.10, 0.75, 0.05, 0.50, 0.95)
Q = vector(0.50, 0.45, 0.60, 0.35, 0.30, 0.20, 0.75, 0.70)
SIGNS = vector(1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0, 0.0)
EIGHTH = torch.full((8,), 1 / 8, dtype=F64)
DPPO = PolicyObjective(**NO_CLIP, tv_low=0.2, tv_high=0.2, kl_coef=2e-3, kl_estimator="k2")


def test_dppo_with_a_squared_log_ratio_to_the_behaviour_policy():
    metrics = check(
        DPPO,
        0.11527048,
        [0.00014695, -0.16659475, -0.06267329, -0.00031319]
        + [0.31272907, 0.03090343, -0.00010137, 0.00007635],
        logprobs=P.log(),
        behaviour=Q.log(),
        advantages=SIGNS,
        weights=EIGHTH,
        ref_logprobs=Q.log(),
    )
    assert metrics["tv_frac"].item() == pytest.approx(2 / 8)  # an advantage of 0 does not count


def test_dppo_as_verl_has_it():
    """The ratio detached and cut at 3."""
    check(
        PolicyObjective(surrogate="cispo", clip_high=2.0, tv_low=0.2, tv_high=0.2),
        -0.02313138,
        [0.0, -0.16666667, -0.0625, 0.0, 0.3125, 0.03125, 0.0, 0.0],
        logprobs=P.log(),
        behaviour=Q.log(),
        advantages=SIGNS,
        weights=EIGHTH,
    )


def test_a_token_on_the_bound_of_the_trust_region_is_inside():
    objective = PolicyObjective(**NO_CLIP, tv_low=0.25, tv_high=0.25)
    moved = {"logprobs": vector(0.75, 0.25).log(), "behaviour": vector(0.5, 0.5).log()}
    check(objective, None, [-1.5, 0.5], advantages=vector(1.0, -1.0), **moved)
    shaped = check(
        objective,
        None,
        [-1.5 * 0.1 / 1.6**2, 0.0],
        logprobs=vector(0.75, 0.15).log(),
        behaviour=vector(0.5, 0.5).log(),
        advantages=vector(1.0, -1.0),
        shaping=vector(0.1, 0.0),
    )
    assert shaped["tv_frac"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tv_low": 0.2}, ["clip_low", "must be None", "0.28"]),
        ({"tv_high": 0.2, **NO_CLIP, "dual_clip": 3.0}, ["dual_clip", "must be None"]),
        ({"tv_high": 0.2, "surrogate": "sapo"}, ["tv_high", "'sapo'"]),
        ({"tv_high": 0.2, **NO_CLIP, "ratio_level": "sequence"}, ["tv_high", "'sequence'"]),
        ({"tv_low": -0.2, **NO_CLIP}, ["tv_low", ">= 0"]),
        ({"kl_estimator": "k4"}, ["k3_ratio, k3_plus, abs", "'k4'"]),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, words):
    with pytest.raises(ValueError) as error:
        PolicyObjective(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_field_survives_the_text_of_an_operator():
    for objective in (DPPO, PolicyObjective(**K3_RATIO), PolicyObjective()):
        assert PolicyObjective.from_text(objective.as_text()) == objective


# ---- KL-Cov: |d| on picked tokens ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("picked", "coef", "loss", "c1"),
    [
        ([5], 1.0, -1.19453015, [-1.22140276, 2.19345976]),
        ([0, 5], 0.1, -1.53453015, [-1.12140276, 1.29345976]),
    ],
)
def test_kl_weights_pick_the_tokens_of_kl_cov(picked, coef, loss, c1):
    others = [-0.81873075, -1.05127110, -0.49658530, 0.8]
    check(
        PolicyObjective(**NO_CLIP, kl_coef=coef, kl_estimator="abs"),
        loss,
        [c1[0], *others, c1[1]],
        ref_logprobs=BEHAVIOUR,
        kl_weights=torch.zeros(6, dtype=F64).index_fill(0, torch.tensor(picked), 1.0),
    )


def test_kl_cov_of_an_unchanged_policy_is_plain_policy_gradient():
    check(
        PolicyObjective(**NO_CLIP, kl_coef=1.0, kl_estimator="abs"),
        None,
        (-ADVANTAGES).tolist(),
        logprobs=BEHAVIOUR,
        ref_logprobs=BEHAVIOUR,
    )
