"""The objective on vectors: published oracles, closed-form coefficients, fixed semantics."""

# Keyword arguments travel in dicts here, and absent gradients fail the tests they are used in.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exgrpo_kernels import PolicyObjective, policy_loss

F64 = torch.float64
EXGRPO = PolicyObjective(clip_low=None, clip_high=None)


def vector(*values):
    return torch.tensor(values, dtype=F64)


def c1_of(objective, logprobs, behaviour, advantages, weights=None, **columns):
    """The loss and its gradient in the log-probabilities."""
    logprobs = logprobs.clone().requires_grad_()
    weights = torch.ones_like(logprobs) if weights is None else weights
    result = policy_loss(
        logprobs,
        advantages=advantages,
        behaviour_logprobs=behaviour,
        weights=weights,
        objective=objective,
        **columns,
    )
    return result, torch.autograd.grad(result.loss, logprobs)[0]


# ---- oracle O2: shaping --------------------------------------------------------------------------

O2 = [
    (0.01, 0.090909, 0.082645),
    (0.05, 0.333333, 0.222222),
    (0.1, 0.500000, 0.250000),
    (0.5, 0.833333, 0.138889),
    (1, 0.909091, 0.082645),
    (1.1, 0.916667, 0.076389),
    (1.2, 0.923077, 0.071006),
    (2, 0.952381, 0.045351),
    (5, 0.980392, 0.019223),
    (10, 0.990099, 0.009803),
]


@pytest.mark.parametrize(("ratio", "value", "slope"), O2)
def test_shaping_table(ratio, value, slope):
    result, c1 = c1_of(
        EXGRPO, vector(math.log(ratio)), vector(0.0), vector(1.0), shaping=vector(0.1)
    )
    assert -result.loss.item() == pytest.approx(value, abs=5e-7)
    assert -c1.item() == pytest.approx(slope, abs=5e-7)
    assert result.metrics["shaped_mean"].item() == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(
    ("gap", "value"), [(-50, 1.928750e-21), (-10, 4.537933e-04), (10, 0.9999955), (50, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_shaping_is_exact_far_from_one(gap, value, dtype):
    result, c1 = c1_of(
        EXGRPO,
        torch.tensor([float(gap)], dtype=dtype),
        torch.zeros(1),
        torch.ones(1),
        shaping=torch.tensor([0.1], dtype=dtype),
    )
    assert -result.loss.item() == pytest.approx(value, rel=1e-5)
    assert c1.isfinite().all()
    if gap == -50:
        assert -c1.item() == pytest.approx(value, rel=1e-5)
    assert result.metrics["log_ratio_clamped"] == 0


@pytest.mark.parametrize(
    ("shaping", "slope"),
    [(0.01, 0.009803), (0.05, 0.045351), (0.3, 0.177515), (0.5, 0.222222), (1.0, 0.25)],
)
def test_shaping_slope_at_ratio_one(shaping, slope):
    _, c1 = c1_of(EXGRPO, vector(-1.3), vector(-1.3), vector(1.0), shaping=vector(shaping))
    assert -c1.item() == pytest.approx(slope, abs=5e-7)


# ---- oracle O3: a mixed group --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_correct", "advantage", "coefficient", "share"),
    [
        (0, 0.875, 0.072314, 0.0763),
        (1, 0.750, 0.061983, 0.0268),
        (2, 0.625, 0.051653, 0.0163),
        (3, 0.500, 0.041322, 0.0117),
        (4, 0.375, 0.030992, 0.0091),
        (5, 0.250, 0.020661, 0.0075),
        (6, 0.125, 0.010331, 0.0063),
    ],
)
def test_mixed_group(num_correct, advantage, coefficient, share):
    """One replayed success beside seven fresh answers, all at ratio one."""
    rewards = vector(1.0, *[1.0] * num_correct, *[0.0] * (7 - num_correct))
    advantages = rewards - rewards.mean()
    assert advantages[0].item() == pytest.approx(advantage, abs=1e-12)
    shaping = vector(0.1, *[0.0] * 7)
    _, c1 = c1_of(EXGRPO, -torch.ones(8, dtype=F64), -torch.ones(8), advantages, shaping=shaping)
    assert -c1[0].item() == pytest.approx(coefficient, abs=5e-7)
    assert (c1[0].abs() / c1.abs().sum()).item() == pytest.approx(share, abs=5e-5)
    # the share it would have without shaping is far larger, and the net coefficient then vanishes
    net = -c1.sum().item()
    f_slope = 0.1 / 1.1**2
    assert net == pytest.approx(-(1 - f_slope) * advantage, abs=1e-12)


def test_group_solved_by_all_is_silent():
    _, c1 = c1_of(EXGRPO, vector(*[-1.0] * 8), vector(*[-2.0] * 8), vector(*[0.0] * 8))
    assert torch.equal(c1, torch.zeros(8, dtype=F64))


# ---- oracle O4: a full ExGRPO loss ---------------------------------------------------------------

O4_ROWS = {  # advantage, new log-probabilities, old ones
    "A0": (0.5, [-0.10, -0.50, -1.20, -0.05], [-0.10, -0.80, -1.20, -0.05]),
    "A1": (-0.5, [-0.30, -2.00, -0.40], [-0.30, -2.00, -0.90]),
    "A2": (-0.5, [-0.70, -0.20], [-0.40, -0.20]),
    "A3": (0.5, [-0.15, -0.90, -0.60, -0.02], [-0.15, -0.90, -0.60, -0.30]),
    "B0": (0.5, [-0.25, -3.00, -0.80], [-0.35, -0.70, -2.00]),
    "B1": (-0.5, [-0.40, -0.10, -1.50, -0.30], [-0.40, -0.50, -1.50, -0.30]),
    "B2": (0.5, [-0.05, -0.60], [-0.30, -0.60]),
    "B3": (-0.5, [-1.00], [-1.00]),
}
O4_GRADIENTS = {
    "A0": [-0.015625, -0.021092, -0.015625, -0.015625],
    "A1": [0.015625, 0.015625, 0.025761],
    "A2": [0.011575, 0.015625],
    "A3": [-0.015625, -0.015625, -0.015625, -0.020674],
    "B0": [-0.001189, -0.003906, -0.000443],
    "B1": [0.015625, 0.023310, 0.015625, 0.015625],
    "B2": [-0.020063, -0.015625],
    "B3": [0.015625],
}
O4_SURROGATES = {  # summed over the row, to be maximised; clipped, then not clipped
    "A0": (2.100000, 2.174929),
    "A1": (-1.824361, -1.824361),
    "A2": (-0.900000, -0.870409),
    "A3": (2.100000, 2.161565),
    "B0": (1.194216, 1.194216),
    "B1": (-2.245912, -2.245912),
    "B2": (1.100000, 1.142013),
    "B3": (-0.500000, -0.500000),
}
# clipped variant: these gradients become 0, the rest stay
O4_CLIPPED = {("A0", 1), ("A2", 0), ("A3", 3), ("B2", 0)}
CLIP = PolicyObjective(clip_low=0.2, clip_high=0.2)


def o4(objective, *, replay_shaping=0.1, rows=tuple(O4_ROWS)):
    new = vector(*(v for row in rows for v in O4_ROWS[row][1]))
    old = vector(*(v for row in rows for v in O4_ROWS[row][2]))
    lengths = [len(O4_ROWS[row][1]) for row in rows]
    repeats = torch.tensor(lengths)
    advantages = vector(*(O4_ROWS[row][0] for row in rows)).repeat_interleave(repeats)
    is_replayed = torch.tensor([row == "B0" for row in rows]).repeat_interleave(repeats)
    shaping = torch.where(is_replayed, replay_shaping, 0.0).to(F64)
    weights = torch.full_like(new, 1 / (8 * 4))
    result, c1 = c1_of(objective, new, old, advantages, weights, shaping=shaping)
    return result, dict(zip(rows, c1.split(lengths), strict=True))


@pytest.mark.parametrize(
    ("objective", "replay_shaping", "expected"),
    [(CLIP, 0.1, -0.031998), (EXGRPO, 0.1, -0.038501), (EXGRPO, 0.0, -0.071894)],
)
def test_full_loss(objective, replay_shaping, expected):
    result, _ = o4(objective, replay_shaping=replay_shaping)
    assert result.loss.item() == pytest.approx(expected, abs=5e-7)


def test_full_loss_in_the_official_scaling():
    assert 8 * o4(EXGRPO)[0].loss.item() == pytest.approx(-0.308010, abs=5e-7)
    assert 8 * o4(CLIP)[0].loss.item() == pytest.approx(-0.255986, abs=5e-7)


@pytest.mark.parametrize("row", O4_ROWS)
def test_full_loss_row_by_row(row):
    clipped, unclipped = O4_SURROGATES[row]
    assert -32 * o4(CLIP, rows=(row,))[0].loss.item() == pytest.approx(clipped, abs=1e-6)
    assert -32 * o4(EXGRPO, rows=(row,))[0].loss.item() == pytest.approx(unclipped, abs=1e-6)


@pytest.mark.parametrize("row", O4_ROWS)
def test_full_loss_gradients(row):
    assert o4(EXGRPO)[1][row].tolist() == pytest.approx(O4_GRADIENTS[row], abs=6e-7)
    clipped = [
        0.0 if (row, t) in O4_CLIPPED else value for t, value in enumerate(O4_GRADIENTS[row])
    ]
    assert o4(CLIP)[1][row].tolist() == pytest.approx(clipped, abs=6e-7)


def test_full_loss_replayed_row():
    result, _ = o4(EXGRPO, rows=("B0",))
    assert result.ratio.tolist() == pytest.approx([1.105171, 0.100259, 3.320117], abs=5e-7)
    assert result.metrics["shaped_mean"].item() == pytest.approx(0.796144, abs=5e-7)
    _, unshaped = o4(EXGRPO, replay_shaping=0.0)
    assert unshaped["B0"].tolist() == pytest.approx([-0.017268, -0.001567, -0.051877], abs=6e-7)
    assert -32 * o4(EXGRPO, replay_shaping=0.0, rows=("B0",))[0].loss.item() == pytest.approx(
        2.262773, abs=1e-6
    )


# ---- closed forms of c1 --------------------------------------------------------------------------

GAPS = [-1.0, -0.4, -0.2231, -0.1, 0.0, 0.1, 0.2, 0.3, 0.9, 1.4]


def grid():
    """Every log-ratio with a positive and a negative advantage."""
    gaps = vector(*GAPS, *GAPS)
    advantages = torch.cat([torch.full((len(GAPS),), 1.7), torch.full((len(GAPS),), -0.6)]).to(F64)
    behaviour = torch.linspace(-3, -1.5, len(gaps), dtype=F64)
    return behaviour + gaps, behaviour, advantages, gaps.exp()


def clip_c1(ratio, advantage, low, high, dual=math.inf):
    silent = (advantage > 0 and ratio > high) or (advantage < 0 and (ratio < low or ratio > dual))
    return 0.0 if silent else -advantage * ratio


def sapo_c1(ratio, advantage, positive, negative):
    t = positive if advantage > 0 else negative
    gate = 1 / (1 + math.exp(-t * (ratio - 1)))
    return -advantage * 4 * gate * (1 - gate) * ratio


@pytest.mark.parametrize(
    ("settings_", "closed_form"),
    [
        ({}, lambda r, a: clip_c1(r, a, 0.8, 1.28)),
        ({"clip_high": 0.2}, lambda r, a: clip_c1(r, a, 0.8, 1.2)),
        ({"clip_low": None}, lambda r, a: clip_c1(r, a, -math.inf, 1.28)),
        ({"clip_high": None}, lambda r, a: clip_c1(r, a, 0.8, math.inf)),
        ({"clip_low": None, "clip_high": None}, lambda r, a: -a * r),
        ({"dual_clip": 2.0}, lambda r, a: clip_c1(r, a, 0.8, 1.28, 2.0)),
        ({"surrogate": "cispo"}, lambda r, a: -a * min(r, 1.28)),
        ({"surrogate": "cispo", "clip_high": None}, lambda r, a: -a * r),
        ({"surrogate": "sapo"}, lambda r, a: sapo_c1(r, a, 1.0, 1.05)),
        (
            {
                "surrogate": "sapo",
                "sapo_temperature_positive": 2.0,
                "sapo_temperature_negative": 3.0,
            },
            lambda r, a: sapo_c1(r, a, 2.0, 3.0),
        ),
        ({"surrogate": "reinforce"}, lambda r, a: -a),
    ],
)
def test_c1_closed_forms(settings_, closed_form):
    logprobs, behaviour, advantages, ratio = grid()
    weights = torch.linspace(0.1, 2.0, len(ratio), dtype=F64)
    _, c1 = c1_of(PolicyObjective(**settings_), logprobs, behaviour, advantages, weights)
    expected = [
        w * closed_form(r, a)
        for w, r, a in zip(weights.tolist(), ratio.tolist(), advantages.tolist(), strict=True)
    ]
    assert c1.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("advantage", "gap", "value"),
    [
        (2.0, 0.5, -2.0 * 1.28),  # capped from above
        (2.0, -0.5, -2.0 * math.exp(-0.5)),  # never from below
        (-2.0, -0.5, 2.0 * 0.8),  # capped from below
        (-2.0, 0.5, 2.0 * math.exp(0.5)),  # never from above ...
        (-2.0, 2.0, 2.0 * 3.0),  # ... unless by the dual clip
    ],
)
def test_clip_values(advantage, gap, value):
    result, _ = c1_of(
        PolicyObjective(dual_clip=3.0), vector(-1 + gap), vector(-1.0), vector(advantage)
    )
    assert result.loss.item() == pytest.approx(value, rel=1e-12)


def test_sapo_and_cispo_values():
    ratio = math.exp(0.5)
    args = vector(-0.5), vector(-1.0), vector(2.0)
    sapo, _ = c1_of(PolicyObjective(surrogate="sapo", sapo_temperature_positive=2.0), *args)
    gate = 1 / (1 + math.exp(-2 * (ratio - 1)))
    assert sapo.loss.item() == pytest.approx(-2 * 2 * gate, rel=1e-12)
    cispo, _ = c1_of(PolicyObjective(surrogate="cispo"), *args)
    assert cispo.loss.item() == pytest.approx(-2 * 1.28 * -0.5, rel=1e-12)
    reinforce, _ = c1_of(PolicyObjective(surrogate="reinforce"), *args)
    assert reinforce.loss.item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
        ("k3_ratio", lambda d: math.exp(-d) - 1 + d, lambda d: d),  # at a ratio of one
        ("k3_plus", lambda d: math.exp(-d) - 1 + d, lambda d: d),
        ("abs", lambda d: abs(d), lambda d: (d > 0) - (d < 0)),
    ],
)
def test_kl_estimators(estimator, value, slope):
    logprobs, ref = vector(-1.0, -2.5, -0.2), vector(-1.4, -0.9, -0.2)
    objective = PolicyObjective(kl_coef=0.3, kl_estimator=estimator)
    result, c1 = c1_of(objective, logprobs, logprobs, torch.zeros(3, dtype=F64), ref_logprobs=ref)
    gaps = (logprobs - ref).tolist()
    assert c1.tolist() == pytest.approx([0.3 * slope(d) for d in gaps], abs=1e-14)
    assert result.loss.item() == pytest.approx(sum(0.3 * value(d) for d in gaps), abs=1e-14)
    assert result.metrics["kl_ref"].item() == pytest.approx(
        sum(value(d) for d in gaps) / 3, abs=1e-14
    )


def test_entropy_bonus():
    entropy = vector(0.5, 1.0, 2.0).requires_grad_()
    weights = vector(1.0, 0.0, 0.25)
    result = policy_loss(
        vector(-1.0, -1.0, -1.0),
        entropy,
        advantages=torch.zeros(3),
        behaviour_logprobs=torch.zeros(3),
        weights=weights,
        objective=PolicyObjective(entropy_coef=0.1),
    )
    assert result.loss.item() == pytest.approx(-0.1 * (0.5 + 0.5), abs=1e-15)
    (gradient,) = torch.autograd.grad(result.loss, entropy)
    assert gradient.tolist() == pytest.approx([-0.1, 0.0, -0.025], abs=1e-16)
    assert result.metrics["entropy_mean"].item() == pytest.approx(1.25)


# ---- sequence ratio ------------------------------------------------------------------------------


def test_sequence_ratio_closed_form():
    """c1 = -A s 1[act] (sum of weights) / |o| (GSPO), with |o| counting trained tokens only."""
    ids = torch.tensor([2, 0, 2, 0, 2, 0, 4])
    gaps = vector(0.3, -0.3, 0.1, -0.5, 77.0, 0.2, 0.5)
    weights = vector(0.5, 1.0, 0.25, 2.0, 0.0, 1.0, 1.0)  # the fifth token is not trained
    by_sequence = {0: -1.5, 2: 2.0, 4: 1.0}
    advantages = vector(*(by_sequence[i] for i in ids.tolist()))
    behaviour = torch.linspace(-3, -1, 7, dtype=F64)
    objective = PolicyObjective(ratio_level="sequence")
    result, c1 = c1_of(
        objective, behaviour + gaps, behaviour, advantages, weights, sequence_ids=ids
    )
    s = {0: math.exp(-0.2), 2: math.exp(0.2), 4: math.exp(0.5)}
    expected_0 = 1.5 * s[0] * 4.0 / 3
    expected_2 = -2.0 * s[2] * 0.75 / 2
    assert c1.tolist() == pytest.approx(
        [expected_2, expected_0, expected_2, expected_0, 0.0, expected_0, 0.0], rel=1e-12
    )
    loss = 1.5 * s[0] * 4.0 - 2.0 * s[2] * 0.75 - 1.28
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    trained_ratio = [result.ratio[i].item() for i in (0, 1, 6)]
    assert trained_ratio == pytest.approx([s[2], s[0], s[4]], rel=1e-12)


def test_shaped_rows_stay_at_token_level_in_a_sequence_objective():
    ids = torch.tensor([0, 0, 1, 1])
    gaps = vector(0.2, -0.4, 0.6, -0.2)
    shaping = vector(0.0, 0.0, 0.1, 0.1)
    objective = PolicyObjective(ratio_level="sequence", clip_low=None, clip_high=None)
    result, c1 = c1_of(
        objective, gaps, torch.zeros(4), torch.ones(4), shaping=shaping, sequence_ids=ids
    )
    f = [w / (w + 0.1) for w in (math.exp(0.6), math.exp(-0.2))]
    s = math.exp(-0.1)
    assert c1.tolist() == pytest.approx([-s, -s, *(-x * (1 - x) for x in f)], rel=1e-12)
    assert result.ratio.tolist() == pytest.approx([s, s, math.exp(0.6), math.exp(-0.2)], rel=1e-12)


def test_token_mean_of_one_token_sequences_equals_the_token_ratio():
    logprobs, behaviour, advantages, _ = grid()
    ids = torch.arange(len(logprobs))
    token, c1_token = c1_of(PolicyObjective(), logprobs, behaviour, advantages)
    sequence, c1_sequence = c1_of(
        PolicyObjective(ratio_level="sequence"), logprobs, behaviour, advantages, sequence_ids=ids
    )
    assert torch.equal(token.loss, sequence.loss)
    assert torch.equal(c1_token, c1_sequence)


# ---- fixed semantics -----------------------------------------------------------------------------

ALL_SURROGATES = ["clip", "cispo", "sapo", "reinforce"]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_rows_of_weight_zero_are_exactly_silent(surrogate, level, junk):
    objective = PolicyObjective(
        surrogate=surrogate, ratio_level=level, kl_coef=0.1, entropy_coef=0.01
    )
    clean = torch.tensor([True, False, True, True, False])

    def loss_of(rows, hidden_value):
        def fill(values):
            values = vector(*values)
            return torch.where(clean, values, hidden_value)[rows]

        logprobs = fill([-1.0, -2.0, -0.5, -3.0, -1.0]).requires_grad_()
        entropy = fill([0.5, 0.1, 0.2, 0.9, 0.3]).requires_grad_()
        ids = torch.where(clean, torch.tensor([0, 0, 0, 1, 1]), 10**9)[rows]
        result = policy_loss(
            logprobs,
            entropy,
            advantages=fill([1.0, 1.0, -1.0, 0.5, 1.0]),
            behaviour_logprobs=fill([-1.2, -2.0, -0.4, -2.5, -1.0]),
            weights=torch.where(clean, vector(1.0, 1.0, 0.5, 0.25, 1.0), 0.0)[rows],
            shaping=fill([0.0, 0.0, 0.0, 0.1, 0.0]),
            ref_logprobs=fill([-1.1, -1.0, -0.6, -2.0, -1.0]),
            sequence_ids=ids,
            objective=objective,
        )
        return result, *torch.autograd.grad(result.loss, (logprobs, entropy))

    result, *gradients = loss_of(slice(None), junk)
    alone, *gradients_alone = loss_of(clean, junk)
    assert torch.equal(result.loss, alone.loss) and result.loss.isfinite()
    for gradient, gradient_alone in zip(gradients, gradients_alone, strict=True):
        assert torch.equal(gradient[clean], gradient_alone)
        assert torch.equal(gradient[~clean], torch.zeros(2, dtype=F64))
    for name, value in result.metrics.items():
        assert torch.equal(value, alone.metrics[name]), name


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_zero_advantage_is_exactly_silent(surrogate, level):
    logprobs = torch.tensor([-1.0, -300.0, -math.inf, -0.1, -2.0])
    behaviour = torch.tensor([-300.0, -1.0, -1.0, -0.1, -math.inf])
    result, c1 = c1_of(
        PolicyObjective(surrogate=surrogate, ratio_level=level),
        logprobs,
        behaviour,
        torch.zeros(5),
        shaping=torch.tensor([0.0, 0.0, 0.0, 0.1, 0.1]),
        sequence_ids=torch.arange(5),
    )
    assert torch.equal(c1, torch.zeros(5))
    assert result.loss == 0


def test_log_ratio_is_clamped_and_counted():
    logprobs, behaviour = vector(-1.0, -30.0, -1.0, -25.0), vector(-30.0, -1.0, -20.5, -1.0)
    weights = vector(1.0, 1.0, 1.0, 0.0)
    result, c1 = c1_of(EXGRPO, logprobs, behaviour, -torch.ones(4, dtype=F64), weights)
    assert result.metrics["log_ratio_clamped"] == 2
    assert result.ratio[:3].tolist() == pytest.approx(
        [math.exp(20), math.exp(-20), math.exp(19.5)], rel=1e-12
    )
    # beyond the clamp there is no slope; inside there is
    assert c1.tolist() == pytest.approx([0.0, 0.0, math.exp(19.5), 0.0], rel=1e-12)


def test_metrics_values():
    gaps = vector(0.5, -0.5, 0.5, -0.5, 1.5, 0.0, 0.3)
    advantages = vector(1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0)
    weights = vector(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0)
    shaping = vector(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1)
    entropy = torch.arange(7, dtype=F64)
    result = policy_loss(
        gaps - 2,
        entropy,
        advantages=advantages,
        behaviour_logprobs=torch.full((7,), -2.0, dtype=F64),
        weights=weights,
        shaping=shaping,
        objective=PolicyObjective(dual_clip=3.0),
    )
    fresh = [0.5, -0.5, 0.5, -0.5, 1.5]
    ratios = [math.exp(g) for g in fresh]
    w = math.exp(0.3)
    expected = {
        "num_trained": 6,
        "num_shaped": 1,
        "ratio_mean": sum(ratios) / 5,
        "ratio_max": math.exp(1.5),
        "clip_frac_low": 1 / 5,
        "clip_frac_high": 1 / 5,
        "dual_clip_frac": 1 / 5,
        "log_ratio_clamped": 0,
        "approx_kl": sum(r - 1 - g for r, g in zip(ratios, fresh, strict=True)) / 5,
        "shaped_mean": w / (w + 0.1),
        "entropy_mean": (0 + 1 + 2 + 3 + 4 + 6) / 6,
    }
    assert {k: v.item() for k, v in result.metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert all(v.ndim == 0 and not v.requires_grad for v in result.metrics.values())


def test_no_rows_and_no_trained_rows():
    for logprobs in (torch.zeros(0), torch.full((3,), math.nan)):
        n = len(logprobs)
        result, c1 = c1_of(
            PolicyObjective(ratio_level="sequence"),
            logprobs,
            torch.zeros(n),
            torch.ones(n),
            torch.zeros(n),
            sequence_ids=torch.zeros(n, dtype=torch.int64),
        )
        assert result.loss == 0 and torch.equal(c1, torch.zeros(n))
        assert all(v == 0 for v in result.metrics.values())


def test_nan_in_a_trained_row_is_never_hidden():
    result, _ = c1_of(PolicyObjective(), vector(math.nan, -1.0), vector(0.0, 0.0), vector(1.0, 1.0))
    assert result.loss.isnan()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 2.0]),
            st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4]),
            st.sampled_from([-100.0, -21.0, -1.0, -0.05, 0.0, 0.05, 1.0, 21.0, 100.0]),
            st.sampled_from([0.0, 0.1, 1.0]),
        ),
        max_size=12,
    ),
    surrogate=st.sampled_from(ALL_SURROGATES),
    level=st.sampled_from(["token", "sequence"]),
    kl=st.sampled_from([0.0, 0.1]),
    order=st.randoms(use_true_random=False),
)
def test_loss_is_finite_additive_and_blind_to_order(rows, surrogate, level, kl, order):
    """Over any mixture of rows: finite, a sum over sequences, the same in any order."""
    objective = PolicyObjective(surrogate=surrogate, ratio_level=level, kl_coef=kl)
    ids = [i // 2 for i in range(len(rows))]

    def loss_of(index):
        picked = [rows[i] for i in index]
        columns = [vector(*(row[c] for row in picked)) for c in range(4)]
        weights, advantages, gaps, shaping = columns
        # relabelled densely: ids live in [0, N)
        seen = {s: k for k, s in enumerate(dict.fromkeys(ids[i] for i in index))}
        sequence_ids = torch.tensor([seen[ids[i]] for i in index], dtype=torch.int64)
        return c1_of(
            objective,
            gaps - 3,
            torch.full_like(gaps, -3),
            advantages,
            weights,
            shaping=shaping,
            ref_logprobs=torch.full_like(gaps, -3.3),
            sequence_ids=sequence_ids,
        )

    whole, c1 = loss_of(range(len(rows)))
    assert whole.loss.isfinite() and c1.isfinite().all()
    assert whole.ratio.isfinite().all()

    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    _, c1_shuffled = loss_of(shuffled)
    torch.testing.assert_close(c1_shuffled, c1[shuffled], rtol=1e-12, atol=1e-300)

    parts = [[i for i in range(len(rows)) if ids[i] % 2 == parity] for parity in (0, 1)]
    total = sum(loss_of(part)[0].loss for part in parts)
    magnitude = 1e-12 * (1 + sum(abs(loss_of([i])[0].loss.item()) for i in range(len(rows))))
    assert abs(total - whole.loss) <= magnitude + 1e-12 * abs(whole.loss)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"surrogate": "ppo"}, ["surrogate", "clip, cispo, sapo, reinforce", "'ppo'"]),
        ({"ratio_level": "group"}, ["ratio_level", "token, sequence"]),
        ({"kl_estimator": "k4"}, ["kl_estimator", "k1, k2, k3"]),
        ({"clip_low": -0.1}, ["clip_low", ">= 0"]),
        ({"clip_high": "0.2"}, ["clip_high", "a finite number or None"]),
        ({"clip_high": math.nan}, ["clip_high", "a finite number or None"]),
        ({"dual_clip": 1.0}, ["dual_clip", "> 1"]),
        ({"dual_clip": 3.0, "surrogate": "sapo"}, ["dual_clip", "surrogate='clip'"]),
        ({"sapo_temperature_positive": 0.0}, ["sapo_temperature_positive", "> 0"]),
        ({"kl_coef": -1.0}, ["kl_coef", ">= 0"]),
        ({"kl_coef": None}, ["kl_coef", "a finite number"]),
        ({"entropy_coef": math.inf}, ["entropy_coef", "a finite number"]),
    ],
)
def test_objective_names_what_it_refuses(settings_, words):
    with pytest.raises(ValueError) as error:
        PolicyObjective(**settings_)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"advantages": torch.zeros(2)}, ["advantages", "[3]", "[2]"]),
        ({"weights": torch.ones(3, dtype=torch.int64)}, ["weights", "floating", "int64"]),
        ({"behaviour_logprobs": torch.zeros(3, device="meta")}, ["behaviour_logprobs", "meta"]),
        ({"shaping": torch.tensor([0.0, -0.1, 0.0])}, ["shaping", ">= 0"]),
        ({"objective": PolicyObjective(kl_coef=0.1)}, ["kl_coef", "ref_logprobs", "[3]"]),
        (
            {"objective": PolicyObjective(ratio_level="sequence")},
            ["ratio_level", "sequence_ids", "[3]"],
        ),
        ({"sequence_ids": torch.tensor([0, 1, 3])}, ["sequence_ids", "[0, 3)"]),
        ({"sequence_ids": torch.zeros(3)}, ["sequence_ids", "int64", "float32"]),
        ({"objective": PolicyObjective(entropy_coef=0.1)}, ["entropy_coef", "entropy", "[3]"]),
        ({"objective": "clip"}, ["objective", "PolicyObjective"]),
    ],
)
def test_policy_loss_names_what_it_refuses(changes, words):
    arguments = {
        "advantages": torch.zeros(3),
        "behaviour_logprobs": torch.zeros(3),
        "weights": torch.ones(3),
    }
    with pytest.raises(ValueError) as error:
        policy_loss(torch.zeros(3), **{**arguments, **changes})
    assert all(word in str(error.value) for word in words), str(error.value)
