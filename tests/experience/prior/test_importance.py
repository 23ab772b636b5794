"""What guided completions weigh: E3, E6, and E9 by enumeration of every completion and flag."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from tabular import Path, Tabular

from exgrpo_fast.experience.prior.importance import Importance, balance_weight, columns_of, mixture
from exgrpo_fast.experience.prior.triggers import Trigger

SIX = 6e-7
FLAGS = torch.tensor([False, False, True, False, False, True])
OLD = torch.tensor([-0.2, -1, -3, -0.5, -0.1, -2], dtype=torch.float64)
PRIOR = torch.tensor([-0.3, -0.7, -0.4, -0.6, -0.1, -0.9], dtype=torch.float64)
NOW = torch.tensor([-0.18, -0.95, -2.7, -0.52, -0.09, -2.1], dtype=torch.float64)


def behaviour(importance, redrawn=FLAGS, old=OLD, prior=PRIOR):
    return columns_of(importance, old_T=old, prior_T=prior, redrawn_T=redrawn).behaviour_logprobs


def test_e3_smoothed_importance() -> None:
    found = behaviour("sis_token")
    expected = [-0.232235, -0.889694, -1.360114, -0.532235, -0.1, -1.488342]
    assert found.tolist() == pytest.approx(expected, abs=SIX)
    ratios = [1.053623, 0.941476, 0.261876, 1.012310, 1.010050, 0.542450]
    assert (NOW - found).exp().tolist() == pytest.approx(ratios, abs=SIX)
    assert float((NOW - found).sum().exp()) == pytest.approx(0.144081, abs=SIX)
    start = [1.032760, 0.895560, 0.194002, 1.032760, 1, 0.599500]
    assert (OLD - found).exp().tolist() == pytest.approx(start, abs=SIX)
    plain = [1.020201, 1.051271, 1.349859, 0.980199, 1.010050, 0.904837]
    assert (NOW - behaviour("none")).exp().tolist() == pytest.approx(plain, abs=SIX)


def test_e3_sequence_and_geometric_form() -> None:
    smoothed = mixture(OLD.sum(), PRIOR.sum(), float(FLAGS.double().mean()))
    assert float((NOW.sum() - smoothed).exp()) == pytest.approx(0.083312, abs=SIX)
    by_token = (NOW - behaviour("sis_token")).mean().exp()
    assert float(by_token) == pytest.approx(0.724049, abs=SIX)
    geometric = (NOW - behaviour("sis_geo")).mean().exp()
    assert float(geometric) == pytest.approx(0.083312 ** (1 / 6), abs=1e-5)
    at_start = (OLD - behaviour("sis_seq")).exp()
    assert at_start.tolist() == pytest.approx([float((OLD.sum() - smoothed).exp())] * 6)


@pytest.mark.parametrize("importance", ["sis_token", "sis_seq", "sis_geo", "flag_token"])
def test_reductions(importance) -> None:
    """Nothing redrawn: the ordinary ratio. Everything: the prior's. A prior that is the policy: 1."""
    never, always = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    assert torch.equal(behaviour(importance, never), OLD)
    total = behaviour(importance, always)
    per_sequence = OLD - (OLD.sum() - PRIOR.sum()) / (6 if importance == "sis_geo" else 1)
    expected = per_sequence if importance in ("sis_seq", "sis_geo") else PRIOR
    assert torch.allclose(total, expected)
    assert torch.allclose(behaviour(importance, FLAGS, prior=OLD), OLD)


def test_e6_balance_weights() -> None:
    logs = torch.tensor([-5.0, 0, 2, 10], dtype=torch.float64)
    found = balance_weight(logs, group_size=16)
    assert found.tolist() == pytest.approx([1.066188, 1, 0.714635, 0.000726], abs=SIX)
    assert float(balance_weight(torch.tensor(-math.inf), group_size=16)) == pytest.approx(16 / 15)


# --- E9 -------------------------------------------------------------------------------------------

E9 = Tabular(Trigger("ratio", 0.5))


def weights(path: Path, importance, cap: float = math.inf) -> torch.Tensor:
    """[T]: what multiplies grad log pi of each token at the first update."""
    columns = columns_of(
        importance,
        old_T=path.old_T,
        prior_T=path.prior_T,
        redrawn_T=path.redrawn_T,
        mu_T=path.mu_T,
        cap=cap,
    )
    ratio = (path.old_T - columns.behaviour_logprobs).exp()
    return ratio if columns.token_weights is None else ratio * columns.token_weights


def figures(problem: Tabular, weigh) -> tuple[float, float, float, float]:
    """(relative bias, cosine, ratio of norms, ratio of variances) to on-policy REINFORCE."""
    true, variance = problem.on_policy()
    mean, own = problem.moments(lambda p: p.reward * problem.score(p.tokens, weigh(p)))
    bias = (mean - true).norm() / true.norm()
    cosine = mean @ true / (mean.norm() * true.norm())
    return float(bias), float(cosine), float(mean.norm() / true.norm()), own / variance


def test_e9_the_problem() -> None:
    root = E9.index[()]
    p = [0.339738, 0.249372, 0.066787, 0.344104]
    r = [0.532513, 0.141517, 0.017829, 0.308141]
    mu = [0.508096, 0.044742, 0.005637, 0.441525]
    assert E9.logp_SV[root].exp().tolist() == pytest.approx(p, abs=SIX)
    assert E9.logr_SV[root].exp().tolist() == pytest.approx(r, abs=SIX)
    assert E9.law.emitted_NV[root].tolist() == pytest.approx(mu, abs=SIX)
    assert float(E9.law.rate_N[root]) == pytest.approx(0.316158, abs=SIX)
    success = {
        name: sum(
            float(E9.along(table, o).sum().exp())
            for o in E9.completions
            if (3 * o[0] + 5 * o[1] + 7 * o[2]) % 4 == 1
        )
        for name, table in (
            ("p", E9.logp_SV),
            ("mu", E9.law.emitted_NV.log()),
            ("r", E9.logr_SV),
        )
    }
    assert list(success.values()) == pytest.approx([0.343535, 0.408898, 0.316657], abs=SIX)
    true, variance = E9.on_policy()
    assert (float(true.norm()), variance) == pytest.approx((0.104738, 0.581399), abs=SIX)
    rho = sum(p.probability * float(p.redrawn_T.double().mean()) for p in E9.paths())
    assert rho == pytest.approx(0.302200, abs=SIX)


@pytest.mark.parametrize(
    ("importance", "cap", "expected"),
    [
        ("none", math.inf, (1.886591, 0.752038, 2.519744, 0.870962)),
        ("sis_token", math.inf, (1.847152, 0.766343, 2.498178, 0.895471)),
        ("sis_seq", math.inf, (1.658582, 0.773793, 2.306650, 0.888555)),
        ("exact_token", math.inf, (1.214735, 0.834721, 1.917467, 3.426266)),
        ("exact_traj", 2.0, (0.570611, 0.848366, 1.061257, 0.501154)),
    ],
)
def test_e9_bias_and_variance(importance, cap: float, expected: tuple[float, ...]) -> None:
    assert figures(E9, lambda p: weights(p, importance, cap)) == pytest.approx(expected, abs=SIX)


def test_e9_flag_wise_product_over_the_trajectory() -> None:
    found = figures(E9, lambda p: weights(p, "flag_token").prod().expand(3))
    assert found == pytest.approx((1.584708, 0.804791, 2.274140, 1.417473), abs=SIX)


def test_e9_the_exact_trajectory_weight_is_unbiased() -> None:
    bias, cosine, norm, variance = figures(E9, lambda p: weights(p, "exact_traj"))
    assert bias < 1e-12 and (cosine, norm) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert variance == pytest.approx(30.323324, abs=SIX)


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [("soft_ratio", 0.5), ("defensive", 0.5), ("entropy", 1.2), ("kl", 0.1), ("tv", 0.2),
     ("js", 0.02), ("random", 0.0)],
)  # fmt: skip
def test_the_exact_weight_is_unbiased_for_every_rule(rule, threshold: float) -> None:
    problem = Tabular(Trigger(rule, threshold, 0.2))
    assert figures(problem, lambda p: weights(p, "exact_traj"))[0] < 1e-12
    by_flags = figures(problem, lambda p: weights(p, "flag_token").prod().expand(3))[0]
    looks_at_the_token = rule in ("soft_ratio", "defensive")
    assert (by_flags > 1e-3) if looks_at_the_token else (by_flags < 1e-12)


def test_the_second_moment_of_the_soft_rule_is_far_smaller() -> None:
    hard = figures(E9, lambda p: weights(p, "exact_traj"))[3]
    soft = figures(Tabular(Trigger("soft_ratio", 0.5)), lambda p: weights(p, "exact_traj"))[3]
    assert soft < hard / 5


def test_e9_balance_heuristic_over_a_group_is_unbiased() -> None:
    """15 fresh completions and one guided one, all weighed by the same function."""
    true, _ = E9.on_policy()
    mean, largest = torch.zeros_like(true), 0.0
    for tokens in E9.completions:
        logp = E9.along(E9.logp_SV, tokens).sum()
        log_mu = E9.along(E9.law.emitted_NV.log(), tokens).sum()
        weight = balance_weight(log_mu - logp, group_size=16)
        share = (15 * logp.exp() + log_mu.exp()) / 16
        reward = float((3 * tokens[0] + 5 * tokens[1] + 7 * tokens[2]) % 4 == 1)
        mean += share * reward * E9.score(tokens, weight.expand(3))
        largest = max(largest, float(weight))
    assert float((mean - true).norm() / true.norm()) < 1e-14
    assert largest == pytest.approx(1.066628, abs=SIX)


def test_e9_the_positive_filter_only_rescales() -> None:
    true, _ = E9.on_policy()
    mean, _ = E9.moments(
        lambda p: (p.reward == 1) * (p.reward - 0.3) * E9.score(p.tokens, weights(p, "exact_traj"))
    )
    assert float((mean - 0.7 * true).norm() / true.norm()) < 1e-14


def test_all_modes_are_tried() -> None:
    assert set(get_args(Importance)) == {
        "none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis",
    }  # fmt: skip
