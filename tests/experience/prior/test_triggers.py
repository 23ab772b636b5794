"""The laws of the triggers: E1, E2, Propositions 1, 5 and 6."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from exgrpo_fast.experience.prior.triggers import (
    STATE_STATISTICS,
    Rule,
    Trigger,
    entropy,
    js,
    kl,
    log_ratio,
    tv,
)

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
R = torch.tensor([[0.2, 0.45, 0.3, 0.05]], dtype=torch.float64)
SIX = 6e-7


def law_of(rule, threshold=0.5, rate=0.0, p=P, r=R):
    return Trigger(rule, threshold, rate).law(p.log(), r.log())


def second_moment(law, p=P) -> float:
    mu = law.emitted_NV
    return float((p * p / mu).sum())


def test_e1_the_papers_rule() -> None:
    law = law_of("ratio")
    delta = log_ratio(P.log(), R.log())[0].tolist()
    assert delta == pytest.approx([0.916291, -0.405465, -0.693147, 0], abs=SIX)
    assert law.rate_N.tolist() == pytest.approx([0.5])
    assert law.emitted_NV[0].tolist() == pytest.approx([0.1, 0.525, 0.3, 0.075])
    weights = (P / law.emitted_NV)[0].tolist()
    assert weights == pytest.approx([5, 0.571429, 0.5, 0.666667], abs=SIX)
    assert second_moment(law) == pytest.approx(2.779762, abs=SIX)
    flag_aware = (P * (law.kept_NV > 0)).sum() + (P[0, 0] ** 2) / law.redrawn_NV[0, 0]
    assert float(flag_aware) == pytest.approx(3.0)


def test_e1_soft_and_defensive() -> None:
    soft = law_of("soft_ratio")
    assert soft.rate_N.tolist() == pytest.approx([0.170256], abs=SIX)
    expected = [0.363795, 0.376615, 0.201077, 0.058513]
    assert soft.emitted_NV[0].tolist() == pytest.approx(expected, abs=SIX)
    weights = (P / soft.emitted_NV)[0].tolist()
    assert weights == pytest.approx([1.374399, 0.796569, 0.745984, 0.854514], abs=SIX)
    assert second_moment(soft) == pytest.approx(1.080794, abs=SIX)
    defensive = law_of("defensive", rate=0.25)
    expected = [0.2, 0.46875, 0.2625, 0.06875]
    assert defensive.emitted_NV[0].tolist() == pytest.approx(expected)
    assert float((P / defensive.emitted_NV).max()) == pytest.approx(2.5)
    assert second_moment(defensive) == pytest.approx(1.564078, abs=SIX)


def test_e1_divergences() -> None:
    found = [float(f(P.log(), R.log())) for f in (entropy, kl, tv, js)]
    assert found == pytest.approx([1.142120, 0.232534, 0.3, 0.053500], abs=SIX)


@pytest.mark.parametrize(("rule", "value"), [("entropy", 1.14212), ("kl", 0.232534), ("tv", 0.3)])
def test_a_state_is_all_policy_or_all_prior(rule, value: float) -> None:
    below, above = law_of(rule, value - 1e-5), law_of(rule, value + 1e-5)
    assert torch.allclose(below.emitted_NV, R) and torch.allclose(above.emitted_NV, P)
    assert (float(below.rate_N), float(above.rate_N)) == (pytest.approx(1.0), 0.0)


def test_random_and_none() -> None:
    assert torch.allclose(law_of("random", rate=0.3).emitted_NV, 0.7 * P + 0.3 * R)
    assert torch.allclose(law_of("none").emitted_NV, P)


def contexts(count: int, size: int = 7):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, size, generator=generator, dtype=torch.float64)
    other = logits + torch.randn(count, size, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), other.softmax(-1)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_law_sums_to_one_and_flags_come_at_its_rate(rule) -> None:
    p, r = contexts(300)
    threshold = {"tv": 0.2, "js": 0.02, "kl": 0.1}.get(rule, 0.5)
    law = law_of(rule, threshold, 0.3, p, r)
    assert torch.allclose(law.emitted_NV.sum(-1), torch.ones(300, dtype=torch.float64))
    assert torch.allclose(law.redrawn_NV.sum(-1), law.rate_N)
    assert bool((law.rate_N > 0).any()) == (rule != "none")
    if rule in STATE_STATISTICS:
        assert set(law.rate_N.round(decimals=12).tolist()) == {0.0, 1.0}


def test_proposition_6_bounds_the_second_moment() -> None:
    tau, (p, r) = 0.5, contexts(10_000)
    law = law_of("ratio", tau, p=p, r=r)
    inside = law.kept_NV == 0
    some = inside.any(-1)
    rate, moment = law.rate_N, (p * p / law.emitted_NV).sum(-1)
    outside = (r * ~inside).sum(-1)
    lower = math.exp(tau) + (1 - rate) ** 2 / (1 - rate + rate * outside)
    conditional = torch.where(inside, p, 0.0) / rate[:, None]
    upper = 1 + rate * ((conditional**2 / r).sum(-1) - 1)
    assert int(some.sum()) > 8_000
    assert bool((lower <= moment + 1e-9)[some].all()) and bool((moment <= upper + 1e-9)[some].all())
    assert torch.allclose(moment[~some], torch.ones(1, dtype=torch.float64))
    one = law_of("ratio")
    lower = math.exp(0.5) + 0.5**2 / (0.5 + 0.5 * 0.8)
    assert lower == pytest.approx(1.926499, abs=SIX) and second_moment(one) > lower


def test_proposition_5_flag_wise_weights_are_biased_by_what_it_says() -> None:
    law, f = law_of("ratio"), torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
    naive = (law.kept_NV * f).sum() + (law.redrawn_NV * P / R * f).sum()
    assert float(naive) == pytest.approx(2.125)
    rejected = law.kept_NV == 0
    bias = law.rate_N * (P * f).sum() - (P * rejected * f).sum()
    assert float(bias) == pytest.approx(0.375)
    aware = (law.kept_NV * f).sum() + (law.redrawn_NV * rejected * P / law.redrawn_NV * f).sum()
    marginal = (law.emitted_NV * P / law.emitted_NV * f).sum()
    assert [float(aware), float(marginal)] == pytest.approx([1.75, 1.75])


def test_e2_the_threshold_itself_does_not_trigger() -> None:
    logp = torch.tensor([-0.10, -1.20, -0.40, -2.00, -0.05], dtype=torch.float64)
    logr = torch.tensor([-0.30, -0.60, -1.10, -3.50, -0.04], dtype=torch.float64)
    trigger = Trigger("ratio", 0.5)
    assert trigger.keep_probability(trigger.statistic(logp, logr)).tolist() == [1, 1, 0, 0, 1]
    assert trigger.keep_probability(torch.tensor([0.5])).tolist() == [1]


def test_what_a_model_cannot_say() -> None:
    """Tokens beyond the prior's vocabulary are always rejected, those beyond the policy's never
    drafted; neither makes a number that is none."""
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    r = torch.tensor([[0.4, 0.0, 0.6]], dtype=torch.float64)
    for rule in get_args(Rule):
        law = law_of(rule, 0.3, 0.5, p, r)
        assert bool(law.emitted_NV.isfinite().all()), rule
        assert float(law.emitted_NV.sum()) == pytest.approx(1.0), rule
    assert law_of("ratio", p=p, r=r).emitted_NV[0].tolist() == pytest.approx([0.7, 0, 0.3])
