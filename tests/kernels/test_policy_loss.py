"""`linear_policy_loss` against float64 autograd of the full logits: every loss, every gradient."""

# Keyword arguments travel in dicts here, and absent gradients fail the tests they are used in.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false

import math
from typing import Any

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from exgrpo_kernels import (
    NonFiniteHidden,
    PolicyObjective,
    linear_logprob,
    linear_logprob_reference,
    linear_policy_loss,
    linear_policy_loss_reference,
    policy_loss,
    runtime,
)

CPU = torch.device("cpu")
F64 = torch.float64

# Of cases.py with other numbers, and more of them.
OBJECTIVES = cases.OBJECTIVES | {
    "symmetric": {"clip_low": 0.2, "clip_high": 0.2},
    "only_high": {"clip_low": None},
    "only_low": {"clip_high": None},
    "dppo": {"clip_low": None, "clip_high": None, "tv_low": 0.01, "tv_high": 0.01},
    "negative_entropy": {"entropy_coef": -0.3, "surrogate": "sapo"},
    "everything": {"dual_clip": 2.0, "kl_coef": 0.1, "entropy_coef": 0.05},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "gspo_cispo": {"ratio_level": "sequence", "surrogate": "cispo"},
    "gspo_sapo": {"ratio_level": "sequence", "surrogate": "sapo"},
    "gspo_everything": {
        "ratio_level": "sequence",
        "dual_clip": 1.5,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
    },
}


def make_batch(num_rows=41, num_tokens=67, num_hidden=11, *, dtype=F64, seed=0, shaped=False):
    """Tensors that want gradients, and columns with masked, silent and clipped rows in them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    hidden, weight, bias = (
        t.to(dtype)
        for t in (
            normal(num_rows, num_hidden),
            normal(num_tokens, num_hidden) / 2,
            normal(num_tokens),
        )
    )
    targets = torch.randint(num_tokens, (num_rows,), generator=generator)
    truth = linear_logprob_reference(hidden.double(), weight.double(), targets, bias=bias.double())
    advantages, weights = normal(num_rows), torch.rand(num_rows, generator=generator, dtype=F64)
    advantages[::6] = 0.0
    weights[::5] = 0.0
    columns = {
        "advantages": advantages,
        "behaviour_logprobs": truth.logprobs + 0.3 * normal(num_rows),
        "ref_logprobs": truth.logprobs + 0.5 * normal(num_rows),
        "weights": weights,
        "sequence_ids": torch.arange(num_rows) // 7,
    }
    if shaped:
        columns["shaping"] = torch.where(torch.arange(num_rows) % 3 == 0, 0.1, 0.0).to(F64)
    return [t.requires_grad_() for t in (hidden, weight, bias)], targets, columns


def gradients_of(function, tensors, targets, columns, *, upstream=1.0, **arguments):
    hidden, weight, bias = tensors
    result = function(hidden, weight, targets, bias=bias, **columns, **arguments)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return result, torch.autograd.grad(upstream * result.loss, wanted)


def assert_same(ours, reference, tolerance=1e-11):
    """Loss, vectors, metrics and gradients agree to a relative tolerance."""
    (result, gradients), (expected, expected_gradients) = ours, reference
    pairs = [(result.loss, expected.loss), (result.logprobs, expected.logprobs)]
    pairs += [(result.entropy, expected.entropy), (result.ratio, expected.ratio)]
    shared = result.metrics.keys() & expected.metrics.keys()
    pairs += [(result.metrics[name], expected.metrics[name]) for name in shared]
    pairs += zip(gradients, expected_gradients, strict=True)
    assert len(shared) >= 10
    for a, b in pairs:
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + scale))


# ---- every loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shaped", [False, True])
def test_matches_float64_autograd(name, shaped):
    tensors, targets, columns = make_batch(shaped=shaped)
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name]), "temperature": 0.9}
    ours = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    reference = gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments)
    assert any(g.abs().max() > 1e-3 for g in ours[1])
    assert_same(ours, reference)


@pytest.mark.parametrize("name", ["clip", "everything", "gspo", "gspo_everything"])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_head(name, softcap, temperature, with_bias):
    tensors, targets, columns = make_batch(29, 33, 5)
    tensors = tensors if with_bias else [*tensors[:2], None]
    if temperature == "rows":
        temperature = torch.linspace(0.5, 1.5, 29)
    arguments = {
        "objective": PolicyObjective(**OBJECTIVES[name]),
        "softcap": softcap,
        "temperature": temperature,
    }
    assert_same(
        gradients_of(linear_policy_loss, tensors, targets, columns, **arguments),
        gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments),
    )


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (6, 1, 4), (33, 129, 17), (130, 31, 1)])
def test_odd_shapes(name, shape):
    tensors, targets, columns = make_batch(*shape)
    columns["weights"][0] = 0.5
    columns["advantages"][0] = 1.0
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    assert_same(
        gradients_of(linear_policy_loss, tensors, targets, columns, **arguments),
        gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_primitive_and_vector_loss_compose_to_the_fused_loss(name):
    (hidden, weight, bias), targets, columns = make_batch()
    objective = PolicyObjective(**OBJECTIVES[name])
    out = linear_logprob(hidden, weight, targets, bias=bias)
    composed = policy_loss(out.logprobs, out.entropy, objective=objective, **columns)
    gradients = torch.autograd.grad(composed.loss, (hidden, weight, bias))
    fused = gradients_of(
        linear_policy_loss, [hidden, weight, bias], targets, columns, objective=objective
    )
    assert_same((composed, gradients), fused)


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_chunk_size_changes_nothing(monkeypatch, name, rows):
    tensors, targets, columns = make_batch()
    columns["weights"][:9] = 0.0  # whole chunks with nothing to train
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    whole = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    monkeypatch.setattr(runtime, "CHUNK_BYTES", rows * 67 * 8)
    monkeypatch.setattr(runtime, "EFFICIENT_ROWS", 1)
    monkeypatch.setattr(runtime, "BLOCK_BYTES", 2 * 67 * 8)
    assert runtime.chunk_rows(41, 67 * 8, CPU) == rows
    chunked = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    assert_same(chunked, whole, 1e-13)


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
def test_fewer_rows_at_a_time_change_nothing(monkeypatch, name):
    tensors, targets, columns = make_batch()
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    whole = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    sizes = []
    new = runtime.empty_logits
    monkeypatch.setattr(
        runtime, "empty_logits", lambda rows, *others: (sizes.append(rows), new(rows, *others))[1]
    )
    for rows in (1, 3, 1000):
        arguments["chunk_rows"] = rows
        chunked = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
        assert_same(chunked, whole, 1e-13)
        assert max(sizes) == min(rows, 41)
        sizes.clear()
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        linear_policy_loss(*tensors[:2], targets, chunk_rows=0, **columns)


@pytest.mark.parametrize("name", ["clip", "entropy", "gspo"])
def test_upstream_gradient_scales(name):
    tensors, targets, columns = make_batch()
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    once = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)[1]
    scaled = gradients_of(
        linear_policy_loss, tensors, targets, columns, upstream=-2.5, **arguments
    )[1]
    for a, b in zip(scaled, once, strict=True):
        torch.testing.assert_close(a, -2.5 * b, rtol=1e-14, atol=0)


def test_backward_accumulates_and_may_run_again():
    (hidden, weight, bias), targets, columns = make_batch()
    result = linear_policy_loss(hidden, weight, targets, bias=bias, **columns)
    result.loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in (hidden, weight, bias)]
    (-2.5 * result.loss).backward(retain_graph=True)
    result.backward()
    for tensor, gradient in zip((hidden, weight, bias), first, strict=True):
        torch.testing.assert_close(tensor.grad, -0.5 * gradient, rtol=1e-14, atol=0)


@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_gradients_are_handed_over_without_a_copy(upstream):
    (hidden, weight, _), targets, columns = make_batch(dtype=torch.float32)
    result = linear_policy_loss(hidden, weight, targets, **columns)
    node: Any = result.loss.grad_fn
    made = {t.data_ptr(): t.clone() for t in node.saved_tensors if t is not None}
    del node
    result.loss.backward(torch.tensor(upstream))
    assert {hidden.grad.data_ptr(), weight.grad.data_ptr()} == made.keys()
    for gradient in (hidden.grad, weight.grad):
        assert torch.equal(gradient, upstream * made[gradient.data_ptr()])


def test_everything_but_the_loss_is_detached():
    (hidden, weight, _), targets, columns = make_batch(dtype=torch.float32)
    result = linear_policy_loss(hidden, weight, targets, **columns)
    assert result.loss.requires_grad and result.loss.shape == ()
    for value in (result.logprobs, result.entropy, result.ratio, *result.metrics.values()):
        assert not value.requires_grad and value.dtype == torch.float32
    out = linear_logprob(hidden, weight, targets)
    composed = policy_loss(out.logprobs, out.entropy, **columns)
    for value in (composed.logprobs, composed.entropy, composed.ratio):
        assert not value.requires_grad


@pytest.mark.parametrize("name", ["clip", "gspo"])
def test_without_gradients(name):
    tensors, targets, columns = make_batch()
    objective = PolicyObjective(**OBJECTIVES[name])
    expected, _ = gradients_of(linear_policy_loss, tensors, targets, columns, objective=objective)
    hidden, weight, bias = tensors
    with torch.no_grad():
        result = linear_policy_loss(
            hidden, weight, targets, bias=bias, objective=objective, **columns
        )
    assert not result.loss.requires_grad
    for name in ("density", "skipped_mass", "rows_skipped"):  # of the backward alone
        del expected.metrics[name]
    assert_same((result, ()), (expected, ()), 1e-14)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("name", ["clip", "gspo_everything"])
def test_only_wanted_gradients(name, wanted):
    tensors, targets, columns = make_batch()
    for tensor, flag in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(bool(flag))
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    assert_same(
        gradients_of(linear_policy_loss, tensors, targets, columns, **arguments),
        gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments),
    )


def test_a_frozen_head_makes_no_weight_gradient():
    (hidden, weight, _), targets, columns = make_batch(31, 67, 11, dtype=torch.float32)
    weight = weight.detach()
    with Shapes() as seen:
        linear_policy_loss(hidden, weight, targets, **columns).loss.backward()
    assert (67, 11) not in seen.shapes
    assert hidden.grad is not None


def test_non_contiguous_inputs():
    (hidden, weight, bias), targets, columns = make_batch()
    strided = [
        hidden.detach().t().contiguous().t().requires_grad_(),
        torch.stack([weight.detach()] * 2, 1)[:, 0].requires_grad_(),
        torch.stack([bias.detach()] * 2, 1)[:, 0].requires_grad_(),
    ]
    assert not any(t.is_contiguous() for t in strided)
    doubled = {name: torch.stack([t, t], 1)[:, 1] for name, t in columns.items()}
    assert_same(
        gradients_of(linear_policy_loss, strided, torch.stack([targets] * 2, 1)[:, 0], doubled),
        gradients_of(linear_policy_loss_reference, [hidden, weight, bias], targets, columns),
    )


# ---- fixed semantics -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything", "reinforce"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_rows_of_weight_zero_are_exactly_silent(name, junk, softcap):
    """Whatever those rows hold, the result is that of a batch in which they are ordinary."""
    tensors, targets, columns = make_batch(dtype=torch.float32, shaped=True)
    hidden, weight, bias = tensors
    masked = columns["weights"] == 0
    temperature = torch.linspace(0.5, 1.5, len(targets))
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name]), "softcap": softcap}
    clean, clean_gradients = gradients_of(
        linear_policy_loss, tensors, targets, columns, temperature=temperature, **arguments
    )

    def fill(values, value):
        return values.detach().masked_fill(masked, value)

    dirty_hidden = hidden.detach().masked_fill(masked[:, None], junk).requires_grad_()
    dirty_columns = {
        k: v if k == "weights" else fill(v, -7 if k == "sequence_ids" else junk)
        for k, v in columns.items()
    }
    for bad_target in (-100, 10**12):
        result, gradients = gradients_of(
            linear_policy_loss,
            [dirty_hidden, weight, bias],
            fill(targets, bad_target),
            dirty_columns,
            temperature=fill(temperature, -1.0),
            **arguments,
        )
        assert torch.equal(gradients[0][masked], torch.zeros(int(masked.sum()), 11))
        for a, b in zip(
            (result.loss, *gradients, *result.metrics.values()),
            (clean.loss, *clean_gradients, *clean.metrics.values()),
            strict=True,
        ):
            assert torch.equal(a, b)
        assert torch.equal(result.logprobs[~masked], clean.logprobs[~masked])
        assert torch.equal(result.logprobs[masked], torch.zeros(int(masked.sum())))


@pytest.mark.parametrize("name", ["clip", "cispo", "sapo", "reinforce", "gspo"])
def test_zero_advantage_is_exactly_silent(name):
    tensors, targets, columns = make_batch(dtype=torch.float32)
    columns["advantages"] = torch.zeros(41)
    columns["behaviour_logprobs"] = torch.full((41,), -300.0)
    result, gradients = gradients_of(
        linear_policy_loss,
        tensors,
        targets,
        columns,
        objective=PolicyObjective(**OBJECTIVES[name]),
    )
    assert result.loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
def test_columns_of_minus_infinity_are_exactly_absent(name):
    (hidden, weight, bias), targets, columns = make_batch()
    targets = targets % 60
    real = [t.detach()[:60].requires_grad_() for t in (weight, bias)]
    masked_bias = bias.detach().clone()
    masked_bias[60:] = -math.inf
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name])}
    padded = [hidden, weight, masked_bias.requires_grad_()]
    result, (dx, dw, db) = gradients_of(linear_policy_loss, padded, targets, columns, **arguments)
    expected, (dx_, dw_, db_) = gradients_of(
        linear_policy_loss_reference, [hidden, *real], targets, columns, **arguments
    )
    assert_same((result, (dx, dw[:60], db[:60])), (expected, (dx_, dw_, db_)))
    assert torch.equal(dw[60:], torch.zeros(7, 11, dtype=F64))
    assert torch.equal(db[60:], torch.zeros(7, dtype=F64))


def test_a_trained_target_on_an_absent_column_gives_no_nan_gradient():
    (hidden, weight, _), targets, columns = make_batch(dtype=torch.float32)
    bias = torch.zeros(67)
    bias[targets[1]] = -math.inf
    result = linear_policy_loss(
        hidden,
        weight,
        targets,
        bias=bias,
        objective=PolicyObjective(entropy_coef=0.1),
        **columns,
    )
    result.loss.backward()
    assert result.logprobs[1] == -math.inf
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
def test_no_rows(name):
    tensors, targets, columns = make_batch(0)
    result, (dx, dw, db) = gradients_of(
        linear_policy_loss, tensors, targets, columns, objective=PolicyObjective(**OBJECTIVES[name])
    )
    assert result.loss == 0 and dx.shape == (0, 11)
    assert torch.equal(dw, torch.zeros(67, 11, dtype=F64))
    assert torch.equal(db, torch.zeros(67, dtype=F64))
    assert result.metrics.pop("density") == 1
    assert all(value == 0 for value in result.metrics.values())


def test_a_non_finite_hidden_state_on_a_trained_row_is_refused_by_name():
    (hidden, weight, _), targets, columns = make_batch(dtype=torch.float32)
    for value in (math.nan, math.inf):
        dirty = hidden.detach().clone()
        dirty[1, 3] = value
        with pytest.raises(NonFiniteHidden, match=r"hidden \[41, 11\] must be finite .* row 1"):
            linear_policy_loss(dirty, weight, targets, **columns)


@pytest.mark.parametrize("name", ["advantages", "behaviour_logprobs", "ref_logprobs"])
def test_nan_in_a_trained_row_is_never_hidden(name):
    (hidden, weight, _), targets, columns = make_batch(dtype=torch.float32)
    columns[name] = columns[name].clone()
    columns[name][1] = math.nan
    objective = PolicyObjective(kl_coef=0.1)
    result = linear_policy_loss(hidden, weight, targets, objective=objective, **columns)
    result.loss.backward()
    assert result.loss.isnan() and hidden.grad[1].isnan().all()
    assert hidden.grad[2:5].isfinite().all()


def test_rows_may_come_in_any_order():
    """Row gradients follow their rows; sums over rows stay."""
    tensors, targets, columns = make_batch(shaped=True)
    hidden, weight, bias = tensors
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    arguments = {"objective": PolicyObjective(**OBJECTIVES["gspo_everything"])}
    result, (dx, dw, db) = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    moved, (dx_, dw_, db_) = gradients_of(
        linear_policy_loss,
        [hidden.detach()[order].requires_grad_(), weight, bias],
        targets[order],
        {name: value[order] for name, value in columns.items()},
        **arguments,
    )
    torch.testing.assert_close(moved.loss, result.loss, rtol=1e-13, atol=0)
    for a, b in ((dx_, dx[order]), (dw_, dw), (db_, db)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradients_add_over_micro_batches():
    """Nothing is divided inside, so splitting the rows splits the sums."""
    tensors, targets, columns = make_batch()
    hidden, weight, bias = tensors
    result, whole = gradients_of(linear_policy_loss, tensors, targets, columns)
    total, parts = 0.0, []
    for rows in (slice(0, 13), slice(13, 41)):
        columns_ = {name: value[rows] for name, value in columns.items()}
        del columns_["sequence_ids"]
        inputs = [hidden.detach()[rows].requires_grad_(), weight, bias]
        part, gradients = gradients_of(linear_policy_loss, inputs, targets[rows], columns_)
        total = total + part.loss
        parts.append(gradients)
    torch.testing.assert_close(total, result.loss, rtol=1e-12, atol=1e-14)
    for index in (1, 2):
        torch.testing.assert_close(
            parts[0][index] + parts[1][index], whole[index], rtol=1e-10, atol=1e-13
        )
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole[0], rtol=1e-10, atol=1e-13)


def test_sparsity_settings_agree():
    tensors, targets, columns = make_batch()
    automatic = gradients_of(linear_policy_loss, tensors, targets, columns, sparsity="auto")
    off = gradients_of(linear_policy_loss, tensors, targets, columns, sparsity="off")
    assert_same(automatic, off, 1e-15)


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_that_of_plain_pytorch(name, dtype):
    """The objective is unclipped, as rounding may carry a row over the edge of a clip."""
    tensors, targets, columns = make_batch(64, 512, 32, dtype=dtype, shaped=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    settings_ = {**OBJECTIVES[name], "clip_low": None, "clip_high": None, "dual_clip": None}
    arguments = {"objective": PolicyObjective(**settings_)}
    ours = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    plain = gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments)
    truth = gradients_of(linear_policy_loss_reference, exact, targets, columns, **arguments)
    assert [g.dtype for g in ours[1]] == [dtype] * 3

    def errors(got):
        values, truths = (got[0].loss, *got[1]), (truth[0].loss, *truth[1])
        return [(v.double() - t).abs().max().item() for v, t in zip(values, truths, strict=True)]

    for error, limit in zip(errors(ours), errors(plain), strict=True):
        assert error <= 2 * limit + 1e-6


def test_nearly_certain_rows_keep_their_small_gradient():
    weight = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 1.0]]).requires_grad_()
    hidden = torch.tensor([[1.0, 0.0]]).requires_grad_()
    linear_policy_loss(
        hidden,
        weight,
        torch.tensor([1]),
        advantages=torch.ones(1),
        behaviour_logprobs=torch.zeros(1),
        weights=torch.ones(1),
    ).loss.backward()
    p = 1 / (1 + 2 * math.exp(-9))
    assert weight.grad[:, 0].tolist() == pytest.approx(
        [p * (1 - p) / 2, -p * (1 - p), p * (1 - p) / 2], rel=1e-3
    )


# ---- memory --------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("name", ["clip", "everything", "gspo_everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_the_full_logits_never_exist(monkeypatch, name, dtype, softcap):
    tensors, targets, columns = make_batch(64, 97, 8, dtype=dtype)
    monkeypatch.setattr(runtime, "CHUNK_BYTES", 4 * 97 * 4)
    monkeypatch.setattr(runtime, "EFFICIENT_ROWS", 1)
    arguments = {"objective": PolicyObjective(**OBJECTIVES[name]), "softcap": softcap}
    with Shapes() as seen:
        gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    assert max(math.prod(shape) for shape in seen.shapes) == 97 * 8  # dW: nothing is larger
    assert (64, 97) not in seen.shapes
    with Shapes() as seen:
        gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments)
    assert (64, 97) in seen.shapes


# ---- properties ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    num_rows=st.integers(0, 12),
    num_tokens=st.sampled_from([1, 2, 5, 31, 33]),
    num_hidden=st.sampled_from([1, 3, 8]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    shaped=st.booleans(),
    softcap=st.sampled_from([None, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_any_batch_matches_the_reference(
    name, num_rows, num_tokens, num_hidden, masked, shaped, softcap, temperature, chunk, seed
):
    tensors, targets, columns = make_batch(
        num_rows, num_tokens, num_hidden, seed=seed, shaped=shaped
    )
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(num_rows, generator=generator) < masked
    columns["weights"] = columns["weights"].masked_fill(is_masked, 0.0)
    arguments = {
        "objective": PolicyObjective(**OBJECTIVES[name]),
        "softcap": softcap,
        "temperature": temperature,
    }
    saved = runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS
    try:
        runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS = chunk * num_tokens * 8, 1
        result, gradients = gradients_of(linear_policy_loss, tensors, targets, columns, **arguments)
    finally:
        runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS = saved
    reference = gradients_of(linear_policy_loss_reference, tensors, targets, columns, **arguments)
    # rows of weight 0 report what their hidden state says; the reference replaces that state
    trained = columns["weights"] != 0
    pairs = [(result.loss, reference[0].loss), *zip(gradients, reference[1], strict=True)]
    pairs += [
        (getattr(result, field)[trained], getattr(reference[0], field)[trained])
        for field in ("logprobs", "entropy", "ratio")
    ]
    for a, b in pairs:
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + scale))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": torch.tensor([0, -100, 1])}, ["targets", "[0, 7)", "trained"]),
        ({"targets": torch.tensor([0, 7, 1])}, ["targets", "[0, 7)", "trained"]),
        ({"weights": torch.ones(2)}, ["weights", "[3]", "[2]"]),
        ({"weights": None}, ["weights", "[3]"]),
        ({"advantages": torch.ones(3, 1)}, ["advantages", "[3]", "[3, 1]"]),
        ({"behaviour_logprobs": torch.ones(4)}, ["behaviour_logprobs", "[3]", "[4]"]),
        ({"temperature": 0}, ["temperature", "> 0"]),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, ["temperature", "> 0"]),
        ({"sparsity": "on"}, ["sparsity", "auto, off", "'on'"]),
        ({"backend": "cuda"}, ["backend", "auto, triton, torch", "'cuda'"]),
        ({"objective": PolicyObjective(kl_coef=1.0)}, ["ref_logprobs", "[3]"]),
        ({"objective": PolicyObjective(ratio_level="sequence")}, ["sequence_ids", "[3]"]),
        ({"objective": 0.2}, ["objective", "PolicyObjective"]),
    ],
)
def test_errors_name_the_argument(changes, words):
    arguments = {
        "targets": torch.zeros(3, dtype=torch.int64),
        "advantages": torch.ones(3),
        "behaviour_logprobs": torch.zeros(3),
        "weights": torch.ones(3),
        **changes,
    }
    with pytest.raises(ValueError) as error:
        linear_policy_loss(torch.zeros(3, 4), torch.zeros(7, 4), **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
