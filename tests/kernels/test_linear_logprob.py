"""`linear_logprob` against its float64 reference: values, gradients, memory, errors."""

# Keyword arguments travel in dicts here, and absent gradients fail the tests they are used in.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from exgrpo_kernels import linear_logprob, linear_logprob_reference, runtime

CPU = torch.device("cpu")
F64 = torch.float64


def make_inputs(num_rows, num_tokens, num_hidden, *, dtype=F64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    hidden = scale * normal(num_rows, num_hidden)
    weight, bias = normal(num_tokens, num_hidden), normal(num_tokens)
    targets = torch.randint(num_tokens, (num_rows,), generator=generator)
    temperature = 0.5 + torch.rand(num_rows, generator=generator, dtype=F64)
    tensors = [t.to(dtype) for t in (hidden, weight, bias)]
    return [t.requires_grad_() for t in tensors], targets, temperature


def gradients_of(function, tensors, targets, *, with_entropy=True, with_lse=False, **arguments):
    """Outputs and gradients under fixed, uneven upstream gradients."""
    hidden, weight, bias = tensors
    out = function(hidden, weight, targets, bias=bias, **arguments)
    n = len(targets)
    upstream = torch.linspace(-1.0, 2.0, n, dtype=out.logprobs.dtype)
    total = (upstream * out.logprobs).sum()
    if with_entropy:
        total = total + (upstream.flip(0) * out.entropy).sum()
    if with_lse:
        total = total + (upstream.square() * out.lse).sum()
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return out, torch.autograd.grad(total, wanted)


def assert_same(ours, reference, tolerance=1e-11):
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two or three rows and blocks of one, whatever the vocabulary."""

    def force(num_tokens, rows=3, itemsize=8):
        monkeypatch.setattr(runtime, "CHUNK_BYTES", rows * num_tokens * itemsize)
        monkeypatch.setattr(runtime, "EFFICIENT_ROWS", 1)
        monkeypatch.setattr(runtime, "BLOCK_BYTES", num_tokens * itemsize)
        assert runtime.chunk_rows(1000, num_tokens * itemsize, CPU) == rows
        assert runtime.block_rows(1000, num_tokens * itemsize) == 1

    return force


# ---- values and gradients ------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 4), (33, 129, 17), (7, 1024, 15), (130, 31, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("temperature", ["one", 0.7, "rows"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64_autograd(shape, softcap, temperature, with_bias):
    tensors, targets, per_row = make_inputs(*shape)
    tensors = tensors if with_bias else [*tensors[:2], None]
    temperature = {"one": 1.0, "rows": per_row}.get(temperature, temperature)
    arguments = {"softcap": softcap, "temperature": temperature}
    for with_entropy, with_lse in ((True, True), (True, False), (False, False)):
        flags = {"with_entropy": with_entropy, "with_lse": with_lse}
        ours = gradients_of(linear_logprob, tensors, targets, **flags, **arguments)
        reference = gradients_of(linear_logprob_reference, tensors, targets, **flags, **arguments)
        assert_same(ours[0], reference[0])
        assert_same(ours[1], reference[1])


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_chunk_size_changes_nothing(small_chunks, softcap):
    tensors, targets, temperature = make_inputs(10, 37, 6)
    arguments = {"softcap": softcap, "temperature": temperature}
    whole = gradients_of(linear_logprob, tensors, targets, **arguments)
    small_chunks(37)
    chunked = gradients_of(linear_logprob, tensors, targets, **arguments)
    assert_same(chunked[0], whole[0], 1e-14)
    assert_same(chunked[1], whole[1], 1e-13)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_fewer_rows_at_a_time_change_nothing(monkeypatch, rows):
    sizes = []
    new = runtime.empty_logits
    monkeypatch.setattr(
        runtime,
        "empty_logits",
        lambda count, *others: (sizes.append(count), new(count, *others))[1],
    )
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (41, 67))
    targets = torch.randint(67, (41,))

    def made(**options):
        out = linear_logprob(hidden, weight, targets, **options)
        total = out.logprobs.sum() + (out.entropy * out.lse).sum()
        return *out, *torch.autograd.grad(total, [hidden, weight])

    whole = made()
    assert sizes == [41, 41]
    for ours, expected in zip(made(chunk_rows=rows), whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-13, rtol=1e-13)
    assert sizes[2:] == [min(rows, 41)] * 2
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        made(chunk_rows=0)


def test_entropy_of_a_uniform_and_of_a_certain_row():
    weight = torch.tensor([[0.0], [0.0], [0.0], [50.0]])
    out = linear_logprob(torch.tensor([[0.0], [1.0]]), weight, torch.tensor([1, 3]))
    assert out.entropy[0].item() == pytest.approx(math.log(4), rel=1e-6)
    assert out.logprobs[0].item() == pytest.approx(-math.log(4), rel=1e-6)
    assert out.entropy[1].item() == pytest.approx(0.0, abs=1e-12)
    assert out.logprobs[1].item() == pytest.approx(0.0, abs=1e-12)
    assert out.lse[1].item() == pytest.approx(50.0)


def test_temperature_one_is_bit_equal_to_none_and_scalar_to_rows():
    (hidden, weight, bias), targets, _ = make_inputs(9, 65, 5, dtype=torch.float32)
    plain = linear_logprob(hidden, weight, targets, bias=bias)
    ones = linear_logprob(hidden, weight, targets, bias=bias, temperature=torch.ones(9))
    for a, b in zip(plain, ones, strict=True):
        assert torch.equal(a, b)


def test_columns_of_minus_infinity_are_exactly_absent():
    """A padded vocabulary gives what the unpadded one gives, and no gradient to the padding."""
    (hidden, weight, bias), targets, temperature = make_inputs(12, 40, 6)
    targets = targets % 32
    real = [t.detach()[:32].requires_grad_() for t in (weight, bias)]
    masked_bias = bias.detach().clone()
    masked_bias[32:] = -math.inf
    padded = [hidden, weight, masked_bias.requires_grad_()]
    for temperature_ in (1.0, temperature):
        for with_entropy in (True, False):
            arguments = {"with_entropy": with_entropy, "temperature": temperature_}
            out, (dx, dw, db) = gradients_of(linear_logprob, padded, targets, **arguments)
            expected, (dx_, dw_, db_) = gradients_of(
                linear_logprob_reference, [hidden, *real], targets, **arguments
            )
            assert_same(out, expected)
            assert_same((dx, dw[:32], db[:32]), (dx_, dw_, db_))
            assert torch.equal(dw[32:], torch.zeros(8, 6, dtype=F64))
            assert torch.equal(db[32:], torch.zeros(8, dtype=F64))


@pytest.mark.parametrize("scale", [1e4, 3e37])
def test_large_logits_stay_exact(scale):
    """One-hot rows with logits far outside the range of exp."""
    weight = torch.eye(4) * scale
    hidden = torch.eye(4).requires_grad_()
    out = linear_logprob(hidden, weight, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(out.logprobs, torch.tensor([0.0, 0.0, 0.0, -scale]))
    assert out.entropy.tolist() == [0.0] * 4
    (dx,) = torch.autograd.grad(out.logprobs[:3].sum() + out.entropy.sum(), hidden)
    assert torch.equal(dx, torch.zeros(4, 4))


def test_non_finite_rows_stay_in_their_rows():
    (hidden, weight, _), targets, _ = make_inputs(6, 19, 4, dtype=torch.float32)
    dirty = hidden.detach().clone()
    dirty[2], dirty[4] = math.nan, math.inf
    dirty.requires_grad_()
    out = linear_logprob(dirty, weight, targets)
    clean = linear_logprob(hidden, weight, targets)
    keep = torch.tensor([0, 1, 3, 5])
    for a, b in zip(out, clean, strict=True):
        torch.testing.assert_close(a[keep], b[keep], rtol=1e-6, atol=1e-6)
        assert not a[[2, 4]].isfinite().any()
    # unused outputs of those rows send exactly nothing back
    dx, dw = torch.autograd.grad(
        out.logprobs[keep].sum() + out.entropy[keep].sum(), (dirty, weight)
    )
    (dw_clean,) = torch.autograd.grad(
        clean.logprobs[keep].sum() + clean.entropy[keep].sum(), weight
    )
    assert torch.equal(dx[[2, 4]], torch.zeros(2, 4))
    torch.testing.assert_close(dw, dw_clean, rtol=1e-5, atol=1e-6)


def test_non_contiguous_inputs():
    tensors, targets, temperature = make_inputs(8, 21, 10)
    hidden, weight, bias = (t.detach() for t in tensors)
    strided = [
        hidden.t().contiguous().t().requires_grad_(),
        torch.stack([weight, weight], 1)[:, 0].requires_grad_(),
        torch.stack([bias, bias], 1)[:, 0].requires_grad_(),
    ]
    assert not any(t.is_contiguous() for t in strided)
    pairs = torch.stack([targets, targets], 1)[:, 0]
    ours = gradients_of(linear_logprob, strided, pairs, temperature=temperature)
    reference = gradients_of(linear_logprob_reference, tensors, targets, temperature=temperature)
    assert_same(ours[0], reference[0])
    assert_same(ours[1], reference[1])
    expanded = hidden[:1].expand(8, 10)
    assert_same(
        linear_logprob(expanded, weight, targets),
        linear_logprob_reference(expanded, weight, targets),
    )


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_wanted_gradients(wanted):
    tensors, targets, _ = make_inputs(9, 23, 5)
    for tensor, flag in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(bool(flag))
    ours = gradients_of(linear_logprob, tensors, targets)
    assert_same(ours[1], gradients_of(linear_logprob_reference, tensors, targets)[1])


def test_no_rows():
    (hidden, weight, bias), targets, _ = make_inputs(0, 11, 4)
    out, (dx, dw, db) = gradients_of(linear_logprob, [hidden, weight, bias], targets)
    assert [len(value) for value in out] == [0, 0, 0]
    assert dx.shape == (0, 4)
    assert torch.equal(dw, torch.zeros(11, 4, dtype=F64))
    assert torch.equal(db, torch.zeros(11, dtype=F64))


def test_scoring_needs_no_gradient():
    (hidden, weight, _), targets, _ = make_inputs(9, 23, 5)
    with torch.no_grad():
        out = linear_logprob(hidden, weight, targets)
    assert not out.logprobs.requires_grad
    assert_same(out, [t.detach() for t in linear_logprob_reference(hidden, weight, targets)])


def test_gradcheck():
    (hidden, weight, bias), targets, temperature = make_inputs(4, 6, 3)

    def outputs(hidden, weight, bias):
        return tuple(
            linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=3.0)
        )

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_second_derivatives_are_refused_not_wrong():
    (hidden, weight, _), targets, _ = make_inputs(3, 5, 2)
    out = linear_logprob(hidden, weight, targets)
    (dx,) = torch.autograd.grad(out.logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


# ---- precision -----------------------------------------------------------------------------------


def worst(values, truths):
    return [(v.double() - t).abs().max().item() for v, t in zip(values, truths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_error_at_most_twice_that_of_plain_pytorch(dtype, scale):
    tensors, targets, _ = make_inputs(64, 512, 32, dtype=dtype, scale=scale)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    arguments = {"temperature": 0.9}
    ours = gradients_of(linear_logprob, tensors, targets, **arguments)
    plain = gradients_of(linear_logprob_reference, tensors, targets, **arguments)
    truth = gradients_of(linear_logprob_reference, exact, targets, **arguments)
    assert all(value.dtype == torch.float32 for value in ours[0])
    assert [g.dtype for g in ours[1]] == [dtype] * 3
    for part in (0, 1):
        limits = worst(plain[part], truth[part])
        for error, limit in zip(worst(ours[part], truth[part]), limits, strict=True):
            assert error <= 2 * limit + 1e-6


def test_low_precision_logits_are_not_rounded():
    """bfloat16 inputs are exact numbers; the logits made from them stay float32."""
    tensors, targets, _ = make_inputs(64, 512, 32, dtype=torch.bfloat16)
    out = linear_logprob(tensors[0], tensors[1], targets)
    exact = linear_logprob_reference(tensors[0].double(), tensors[1].double(), targets)
    assert max(worst(out, exact)) < 2e-5


def test_mixed_dtypes_use_the_wider_arithmetic():
    (hidden, weight, bias), targets, _ = make_inputs(9, 33, 8)
    mixed = [
        hidden.detach().bfloat16().requires_grad_(),
        weight.detach().float().requires_grad_(),
        bias,
    ]
    out, gradients = gradients_of(linear_logprob, mixed, targets)
    exact, truth = gradients_of(
        linear_logprob_reference, [t.detach().double().requires_grad_() for t in mixed], targets
    )
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, F64]
    assert max(worst(out, exact)) < 1e-5
    assert max(worst(gradients[1:], truth[1:])) < 1e-4


def test_tiles_of_a_low_precision_weight(monkeypatch):
    tensors, targets, _ = make_inputs(5, 33, 8, dtype=torch.bfloat16)
    whole = gradients_of(linear_logprob, tensors, targets)
    monkeypatch.setattr(runtime, "TILE_BYTES", 4 * 8 * 4)
    tiled = gradients_of(linear_logprob, tensors, targets)
    assert_same(tiled[0], whole[0], 1e-5)
    assert_same(tiled[1], whole[1], 1e-2)


def test_autocast_changes_nothing():
    """Every GEMM writes into a given tensor, which autocast leaves alone."""
    (hidden, weight, _), targets, _ = make_inputs(9, 33, 8, dtype=torch.float32)
    expected = gradients_of(linear_logprob, [hidden, weight, None], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients_of(linear_logprob, [hidden, weight, None], targets)
    for part in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(ours[part], expected[part], strict=True))


# ---- memory --------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_full_logits_never_exist(small_chunks, dtype):
    tensors, targets, _ = make_inputs(64, 97, 8, dtype=dtype)
    small_chunks(97, rows=4, itemsize=4)
    with LargestTensor() as largest:
        gradients_of(linear_logprob, tensors, targets)
    assert largest.numel == 97 * 8  # dW: nothing is larger
    with LargestTensor() as largest:
        gradients_of(linear_logprob_reference, tensors, targets)
    assert largest.numel == 64 * 97


def test_chunks_follow_bytes():
    vocabulary_bytes = 32768 * 4
    assert runtime.chunk_rows(10**6, vocabulary_bytes, CPU) == 384
    assert runtime.chunk_rows(10**6, 100, CPU) == runtime.CHUNK_BYTES // 100
    assert runtime.chunk_rows(10**6, 152_000 * 4, CPU) == 384  # enough rows for an efficient GEMM
    assert runtime.chunk_rows(10**6, 2**31, CPU) == 1  # one row at least
    assert runtime.chunk_rows(7, vocabulary_bytes, CPU) == 7


# ---- properties ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(0, 9),
    num_tokens=st.sampled_from([1, 2, 3, 31, 32, 33]),
    num_hidden=st.sampled_from([1, 2, 7]),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    softcap=st.sampled_from([None, 5.0]),
    temperature=st.sampled_from([0.1, 1.0, 10.0]),
    num_masked=st.integers(0, 3),
    chunk=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(
    num_rows, num_tokens, num_hidden, scale, softcap, temperature, num_masked, chunk, seed
):
    tensors, targets, _ = make_inputs(num_rows, num_tokens, num_hidden, seed=seed, scale=scale)
    num_masked = min(num_masked, num_tokens - 1)
    if num_masked and softcap is None:
        bias = tensors[2].detach().clone()
        bias[num_tokens - num_masked :] = -math.inf
        tensors[2] = bias.requires_grad_()
        targets = targets % (num_tokens - num_masked)
    arguments = {"softcap": softcap, "temperature": temperature}
    saved = runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS
    try:
        runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS = chunk * num_tokens * 8, 1
        ours = gradients_of(linear_logprob, tensors, targets, **arguments)
    finally:
        runtime.CHUNK_BYTES, runtime.EFFICIENT_ROWS = saved
    reference = gradients_of(linear_logprob_reference, tensors, targets, **arguments)
    for part in (0, 1):
        for a, b in zip(ours[part], reference[part], strict=True):
            size = b.abs().max().item() if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * (1 + scale + size))
    assert (ours[0].entropy >= -1e-12).all()
    assert (ours[0].entropy <= math.log(num_tokens) + 1e-12).all()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ["hidden", "[N, D]", "[2, 3, 4]"]),
        ({"hidden": torch.zeros(3, 5)}, ["weight", "[V, 5]", "[7, 4]"]),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, ["hidden", "bfloat16", "int32"]),
        ({"weight": torch.zeros(7)}, ["weight", "[V, D]", "[7]"]),
        ({"weight": torch.zeros(0, 4)}, ["weight", "at least one token", "[0, 4]"]),
        ({"weight": torch.zeros(7, 4, device="meta")}, ["weight", "cpu", "meta"]),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ["targets", "[3]", "[2]"]),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, ["targets", "int64", "int32"]),
        ({"targets": torch.tensor([0, 7, 1])}, ["targets", "[0, 7)"]),
        ({"targets": torch.tensor([0, -100, 1])}, ["targets", "[0, 7)"]),
        ({"targets": torch.tensor([0, 2**63 - 1, 1])}, ["targets", "[0, 7)"]),
        ({"bias": torch.zeros(4)}, ["bias", "[7]", "[4]"]),
        ({"bias": torch.zeros(7, dtype=torch.int64)}, ["bias", "floating", "int64"]),
        ({"temperature": 0.0}, ["temperature", "> 0", "0.0"]),
        ({"temperature": -1}, ["temperature", "> 0", "-1"]),
        ({"temperature": math.nan}, ["temperature", "> 0", "nan"]),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ["temperature", "> 0"]),
        ({"temperature": torch.ones(2)}, ["temperature", "[3]", "[2]"]),
        ({"softcap": 0.0}, ["softcap", "> 0"]),
        ({"backend": "cuda"}, ["backend", "auto, triton, torch", "'cuda'"]),
    ],
)
def test_errors_name_the_argument(changes, words):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    arguments.update(changes)
    hidden, weight, targets = (arguments.pop(name) for name in ("hidden", "weight", "targets"))
    with pytest.raises(ValueError) as error:
        linear_logprob(hidden, weight, targets, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
