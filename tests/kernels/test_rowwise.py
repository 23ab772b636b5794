"""The Triton row kernels: property suite, structure, and seeded bugs that the suite has to find."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import importlib.util
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import (
    CHECKS,
    F64,
    OBJECTIVES,
    Case,
    check_policy_loss,
    make_batch,
    random_case,
    run_loss,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import shuffled_programs

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_policy_loss,
    row_kernels,
    rowwise,
    runtime,
)
from exgrpo_kernels.linear_head import LinearLogprob, RowCoefficients, RowInputs
from exgrpo_kernels.objective import LossColumns
from exgrpo_kernels.policy_loss import linear_policy_loss_reference


@pytest.fixture
def small_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few hundred columns take several blocks."""
    monkeypatch.setattr(runtime, "ROW_BLOCK", 128)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [
    pytest.mark.usefixtures("small_row_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy plays GPU: NaN, inf, overflow
    pytest.mark.skipif(
        not (runtime.is_interpreting() or DEVICE.type == "cuda"), reason="nothing runs Triton"
    ),
]


# ---- properties: 100 cases a run, 2,000 of `make test-kernels` -----------------------------------


FEW = [("policy_loss", 50), ("logprob", 25), ("from_logits", 25)]
MANY = [pytest.param(check, 20 * count, marks=pytest.mark.slow) for check, count in FEW]


@pytest.mark.parametrize(("check", "examples"), FEW + MANY)
def test_any_case_keeps_the_rule(check, examples):
    # the same cases in each run: what a commit is blamed for is its own
    # and fewer on a GPU, where each shape and option of a case is compiled
    examples = examples if runtime.is_interpreting() else min(examples // 5, 50)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(rng=st.randoms(use_true_random=False))
    def run(rng: random.Random) -> None:
        CHECKS[check](random_case(rng, check, device=DEVICE.type), "triton")

    run()


# What random cases have found is kept.
BEYOND_FLOAT16 = Case(
    seed=144440,
    objective="entropy",
    num_rows=5,
    num_tokens=31,
    num_hidden=2,
    dtype=torch.float16,
    scale=4.0,
    temperature=0.6,
    bias="some",
    dirty=True,
    strided=True,
    device=DEVICE.type,
)


def test_a_gradient_that_float16_cannot_hold_is_infinite():
    case = BEYOND_FLOAT16
    batch = make_batch(case)
    truth = run_loss(linear_policy_loss_reference, batch, case, F64)["dhidden"]
    ours = run_loss(linear_policy_loss, batch, case, None, backend="triton")["dhidden"]
    assert truth.abs().max() > 1e6
    assert torch.equal(ours.isfinite(), truth.to(torch.float16).isfinite())
    CHECKS["policy_loss"](case, "triton")


# x / softcap = 4.2, where 1 - tanh^2 has four digits left.
NEAR_THE_CAP = Case(
    seed=749662,
    num_tokens=1,
    num_hidden=1,
    scale=0.1,
    certain=True,
    softcap=3.0,
    bias="absent",
    device=DEVICE.type,
)


def test_the_slope_near_the_softcap_keeps_its_digits():
    CHECKS["logprob"](NEAR_THE_CAP, "triton")


EVERY_LOSS = [
    Case(
        objective=objective,
        num_rows=9,
        shaped=extreme,
        kl_weighted=not extreme,
        masked=0.3,
        silent=0.2,
        dirty=True,
        extreme=extreme,
        device=DEVICE.type,
    )
    for objective in OBJECTIVES
    for extreme in (False, True)
]


# Every log-ratio with both signs of advantage, beyond the clamp of 20 too, and nothing shaped.
BEYOND_THE_CLAMP = Case(objective="clip", num_rows=64, device=DEVICE.type)


@pytest.mark.parametrize("case", EVERY_LOSS, ids=lambda c: f"{c.objective}-{c.extreme}")
@pytest.mark.parametrize("check", ["policy_loss", "from_logits"])
def test_every_loss(case, check):
    CHECKS[check](case, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_the_shipped_size(monkeypatch, dtype):
    monkeypatch.undo()
    assert runtime.row_kernel_shape(10**5)[:2] == (runtime.ROW_BLOCK, runtime.ROW_WARPS)
    case = Case(num_rows=3, num_tokens=9001, num_hidden=8, dtype=dtype, device=DEVICE.type)
    check_policy_loss(case, "triton")


# ---- scalar functions ----------------------------------------------------------------------------


@triton.jit
def scalar_functions_kernel(inputs, tanhs, logs, exps, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(inputs + index)
    tl.store(tanhs + index, row_kernels.tanh_and_slope(x)[0])
    tl.store(logs + index, row_kernels.log_of_one_plus(tl.abs(x)))
    tl.store(exps + index, row_kernels.one_minus_exp(-tl.abs(x)))


def test_scalar_functions_are_accurate_relative_to_their_value():
    magnitudes = torch.logspace(-8, 1.3, 512)
    x = torch.cat([-magnitudes, magnitudes]).to(DEVICE)
    tanh, log, exp = (torch.empty_like(x) for _ in range(3))
    scalar_functions_kernel[(1,)](x, tanh, log, exp, SIZE=1024)
    wide = x.double()
    for ours, truth in (
        (tanh, wide.tanh()),
        (log, wide.abs().log1p()),
        (exp, -(-wide.abs()).expm1()),
    ):
        assert ((ours.double() - truth) / truth).abs().max() < 5e-7


# ---- structure -----------------------------------------------------------------------------------


def row_inputs(num_rows: int, num_columns: int) -> RowInputs:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(num_columns, (num_rows,), generator=generator)
    return RowInputs(targets.to(DEVICE), temperature=0.8)


def some_columns(objective: PolicyObjective, num_rows: int, **changes) -> LossColumns:
    generator = torch.Generator().manual_seed(2)
    columns: dict[str, Any] = {
        "advantages": torch.randn(num_rows, generator=generator),
        "behaviour_logprobs": -6 + torch.randn(num_rows, generator=generator),
        "weights": torch.ones(num_rows),
    } | changes
    unchecked = LossColumns(**{k: c.to(DEVICE) for k, c in columns.items()})
    return unchecked.checked(objective, num_rows, torch.float32, DEVICE)


def some_logits(num_rows: int, num_columns: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(num_rows, num_columns, generator=generator)).to(DEVICE, dtype)


CLIP = PolicyObjective(entropy_coef=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [1, 127, 128, 300])
def test_nothing_outside_the_rows_is_touched(dtype, num_columns):
    """Guard bands before, between and behind the rows, and around every vector of statistics."""
    num_rows, stride, guard = 5, num_columns + 7, -12345.0
    storage = torch.full(((num_rows + 2) * stride,), guard, dtype=dtype, device=DEVICE)
    rows = storage[stride : stride + num_rows * stride].view(num_rows, stride)[:, :num_columns]
    rows.copy_(some_logits(num_rows, num_columns, dtype))
    before = storage.clone()
    vectors = []

    class Guarded(rowwise.TritonRows):
        def new_statistics(self, num_rows: int) -> LinearLogprob:
            for _ in range(3):
                vectors.append(torch.full((num_rows + 8,), guard, device=DEVICE))
            return LinearLogprob(*(vector[4:-4] for vector in vectors[-3:]))

    buffer = Guarded(rows, operand_dtype=dtype, keeps_masses=True)
    inputs = row_inputs(num_rows, num_columns)
    buffer.statistics(inputs)
    assert torch.equal(storage, before), "scoring must not write logits"
    buffer.policy_gradient(inputs, CLIP, some_columns(CLIP, num_rows))
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[stride : stride + num_rows * stride].view(num_rows, stride)[:, :num_columns] = False
    assert torch.equal(storage[outside], before[outside])
    for vector in vectors:
        assert (vector[:4] == guard).all() and (vector[-4:] == guard).all()
        assert (vector[4:-4] != guard).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU chooses its own order")
def test_the_order_of_programs_changes_no_bit(monkeypatch):
    inputs, columns = row_inputs(9, 300), some_columns(CLIP, 9)
    outcomes = []
    for seed, programs in ((0, 9), (1, 9), (2, 4), (3, 2), (4, 1)):
        monkeypatch.setattr(runtime, "num_programs", lambda device, programs=programs: programs)
        buffer = rowwise.TritonRows(some_logits(9, 300), operand_dtype=torch.float32)
        with shuffled_programs(seed):
            statistics, gradient = buffer.policy_gradient(inputs, CLIP, columns)
        outcomes.append((*statistics, gradient.dlogits_LV))
    for outcome in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcome, outcomes[0], strict=True))


def test_masses_are_the_sums_of_the_gradient_over_tiles():
    columns = some_columns(CLIP, 6, weights=torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0]))
    buffer = rowwise.TritonRows(some_logits(6, 300), operand_dtype=torch.float32, keeps_masses=True)
    _, gradient = buffer.policy_gradient(row_inputs(6, 300), CLIP, columns)
    padded = torch.nn.functional.pad(gradient.dlogits_LV.abs().double(), (0, 320 - 300))
    expected = padded.view(6, 5, row_kernels.MASS_TILE).sum(-1)
    assert buffer.masses is not None and buffer.masses.shape == (6, 5)
    torch.testing.assert_close(buffer.masses.double(), expected, rtol=1e-5, atol=1e-7)
    assert (buffer.masses[1] == 0).all() and (buffer.masses[0] > 0).all()


def test_a_narrow_gradient_is_the_rounded_wide_one():
    inputs, columns = row_inputs(5, 700), some_columns(CLIP, 5)
    wide = rowwise.TritonRows(some_logits(5, 700), operand_dtype=torch.float32)
    narrow = rowwise.TritonRows(some_logits(5, 700), operand_dtype=torch.bfloat16)
    _, expected = wide.policy_gradient(inputs, CLIP, columns)
    _, gradient = narrow.policy_gradient(inputs, CLIP, columns)
    assert gradient.dlogits_LV.data_ptr() == narrow.logits.data_ptr()
    assert torch.equal(gradient.dlogits_LV, expected.dlogits_LV.to(torch.bfloat16))


def test_dead_rows_are_zero_and_never_read():
    logits = some_logits(4, 300)
    logits[1] = float("nan")
    columns = some_columns(CLIP, 4, weights=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    buffer = rowwise.TritonRows(logits, operand_dtype=torch.float32)
    _, gradient = buffer.policy_gradient(row_inputs(4, 300), CLIP, columns)
    assert gradient.alive_L is not None and gradient.alive_L.tolist() == [True, False, True, False]
    assert torch.count_nonzero(gradient.dlogits_LV[1::2]) == 0
    assert (gradient.dlogits_LV[::2].abs().sum(-1) > 0).all()


def test_padding_rows_become_zero(monkeypatch):
    """A chunk of 3 rows whose GEMM has 8; rows 3 .. 7 hold whatever was there."""
    monkeypatch.setattr(runtime, "padded_rows", lambda num_rows, chunk_rows, device: 8)
    inputs = row_inputs(3, 130)
    for given_coefficients in (False, True):
        logits = some_logits(8, 130)
        logits[3:] = float("nan")
        buffer = rowwise.TritonRows(logits, operand_dtype=torch.float32)
        if given_coefficients:
            statistics = buffer.statistics(inputs)
            coefficients = RowCoefficients(torch.ones(3, device=DEVICE))
            gradient = buffer.gradient(inputs, statistics, coefficients)
        else:
            statistics, gradient = buffer.policy_gradient(inputs, CLIP, some_columns(CLIP, 3))
        assert len(statistics.logprobs) == 3 and gradient.dlogits_LV.shape == (8, 130)
        assert torch.count_nonzero(gradient.dlogits_LV[3:]) == 0
        assert gradient.dlogits_LV[:3].isfinite().all()


def test_row_offsets_beyond_32_bits():
    """Row 2 of a stride of 2^30 + 64 starts past 2^31 elements."""
    stride, num_columns = 2**30 + 64, 130
    storage = torch.empty(2 * stride + num_columns, dtype=torch.bfloat16, device=DEVICE)
    rows = storage.as_strided((3, num_columns), (stride, 1))
    rows.copy_(some_logits(3, num_columns, torch.bfloat16))
    dense = rowwise.TritonRows(rows.clone().contiguous(), operand_dtype=torch.bfloat16)
    sparse = rowwise.TritonRows(rows, operand_dtype=torch.bfloat16)
    inputs, columns = row_inputs(3, num_columns), some_columns(CLIP, 3)
    expected = dense.policy_gradient(inputs, CLIP, columns)
    ours = sparse.policy_gradient(inputs, CLIP, columns)
    assert torch.equal(ours[0].lse, expected[0].lse)
    assert torch.equal(ours[1].dlogits_LV, expected[1].dlogits_LV)


def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    batch = make_batch(Case(num_rows=6, num_tokens=300, device=DEVICE.type))
    arguments = {"backend": "triton", "temperature": 0.7}
    together = linear_logprob(batch.hidden, batch.weight, batch.targets, **arguments)
    order = torch.tensor([3, 0, 5, 1])
    apart = linear_logprob(batch.hidden[order], batch.weight, batch.targets[order], **arguments)
    # the GEMM of a CPU may order its sums by shape: the same logits, then
    torch.testing.assert_close(apart.logprobs, together.logprobs[order], rtol=0, atol=2e-6)
    inputs, logits = row_inputs(6, 300), some_logits(6, 300)
    whole = rowwise.TritonRows(logits, operand_dtype=torch.float32).statistics(inputs)
    part = rowwise.TritonRows(logits[order].contiguous(), operand_dtype=torch.float32)
    for a, b in zip(part.statistics(inputs.rows(order)), whole, strict=True):
        assert torch.equal(a, b[order])


# ---- seeded bugs: the suite above has to find each of them ---------------------------------------

SEEDED_BUGS = {
    "sum_not_rescaled_at_a_new_maximum": (
        "others = others * rescale + exps",
        "others = others + exps",
    ),
    "columns_past_the_vocabulary_counted": (
        "x * inverse_temperature, MINUS_INFINITY), slope",
        "x * inverse_temperature, 0.0), slope",
    ),
    "target_counted_twice": (
        "exps = tl.where(columns == target, 0.0, tl.exp(distance))",
        "exps = tl.exp(distance)",
    ),
    "entropy_moment_not_shifted": (
        "moments = (moments + others * drop) * rescale",
        "moments = moments * rescale",
    ),
    "absent_columns_make_nan": (
        "return tl.where(z == MINUS_INFINITY, LOWEST, z - shift)",
        "return z - shift",
    ),
    "clip_by_the_wrong_sign": (
        "tl.where(advantage > 0.0, ratio <= ratio_high, ratio <= dual_clip)",
        "tl.where(advantage < 0.0, ratio <= ratio_high, ratio <= dual_clip)",
    ),
    "gradient_beyond_the_clamp_of_the_ratio": (
        "reached = tl.where(in_range, ratio, 0.0)",
        "reached = ratio",
    ),
    "shaped_rows_clipped": (
        "slope = tl.where(shaping > 0.0, shaped, slope)",
        "slope = slope",
    ),
    "trust_region_on_the_wrong_side": (
        "moved > tv_high, moved < -tv_low",
        "moved > tv_high, moved > tv_low",
    ),
    "trust_region_ignores_the_sign": (
        "tl.where(advantage > 0.0, moved > tv_high, moved < -tv_low)",
        "moved > tv_high",
    ),
    "ratio_of_the_kl_detached": (
        "kl_slope = ratio * tl.where(in_range, both, kl_slope)",
        "kl_slope = ratio * kl_slope",
    ),
    "ratio_of_the_kl_pulls_beyond_its_clamp": (
        "ratio * tl.where(in_range, both, kl_slope)",
        "ratio * both",
    ),
    "absolute_kl_of_one_sign": (
        "tl.where(gap < 0.0, -1.0, 0.0)",
        "tl.where(gap < 0.0, 1.0, 0.0)",
    ),
    "kl_weights_forgotten": (
        "kl_slope *= kl_weight",
        "kl_slope *= 1.0",
    ),
    "masked_rows_leak_nan": (
        "return tl.where(weight == 0.0, 0.0, c1)",
        "return c1",
    ),
    "silent_rows_leak": (
        "tl.where(advantage == 0.0, 0.0, -advantage * slope)",
        "-(advantage + 1e-3) * slope",
    ),
    "softcap_slope_forgotten": (
        "slope = inverse_temperature * derivative",
        "slope = inverse_temperature",
    ),
    "softcap_slope_cancels": (
        "slope = inverse_temperature * derivative",
        "slope = inverse_temperature * (1.0 - tanh * tanh)",
    ),
    "temperature_slope_forgotten": (
        "slope = inverse_temperature\n    if bias",
        "slope = 1.0\n    if bias",
    ),
    "entropy_gradient_with_the_wrong_sign": (
        "dz = tl.exp(log_p) * (c2 * (log_p + entropy)",
        "dz = tl.exp(log_p) * (c2 * (log_p - entropy)",
    ),
    "lse_gradient_dropped": (
        "+ (c3 - c1))",
        "+ (-c1))",
    ),
    "certain_target_cancels": (
        "c1 * one_minus_exp(logprob)",
        "c1 * (1.0 - (tl.exp(logprob) + 1e-4))",
    ),
    "dead_rows_not_cleared": (
        "if not alive:\n            store_zeros",
        "if num_columns < 0:\n            store_zeros",
    ),
    "every_other_row_skipped": (
        "tl.program_id(0), num_padded, tl.num_programs(0)):\n        r = tl.cast(index, tl.int64)\n"
        "        row_masses",
        "tl.program_id(0), num_padded, 2 * tl.num_programs(0)):\n"
        "        r = tl.cast(index, tl.int64)\n        row_masses",
    ),
    "store_past_the_row": (
        "dx.to(out.dtype.element_ty), mask=columns < num_columns)",
        "dx.to(out.dtype.element_ty), mask=columns < num_columns + 1)",
    ),
}


@pytest.fixture
def with_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """with_bug(name) puts a broken copy of row_kernels.py in the place of the real one."""

    def load(name: str, path: Path) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    def install(name: str) -> types.ModuleType:
        source = Path(row_kernels.__file__).read_text()
        right, wrong = SEEDED_BUGS[name]
        assert source.count(right) == 1, f"{name}: the text to break is not there once"
        path = tmp_path / "row_kernels.py"
        path.write_text(source.replace(right, wrong))
        load("exgrpo_kernels.row_kernels", path)
        return load("exgrpo_kernels.rowwise", Path(rowwise.__file__))

    yield install


# The loss that a bug is in: many rows of it come first, which finds the bug at once.
LOSS_OF_BUG = {
    "trust_region_on_the_wrong_side": "dppo",
    "trust_region_ignores_the_sign": "dppo",
    "ratio_of_the_kl_detached": "k3_ratio",
    "ratio_of_the_kl_pulls_beyond_its_clamp": "k3_ratio",
    "absolute_kl_of_one_sign": "abs",
    "kl_weights_forgotten": "k1",
    "entropy_gradient_with_the_wrong_sign": "entropy",
}


def suite_finds_something_wrong(module: types.ModuleType, first: str | None = None) -> bool:
    """Guard bands, the kept cases, the loss `first`, every loss, then 50 cases as the property test
    draws them."""
    rng = random.Random(0)
    try:
        storage = torch.zeros(5, 140, device=DEVICE)
        rows = storage[:, :130]
        rows.copy_(some_logits(5, 130))
        buffer = module.TritonRows(rows, operand_dtype=torch.float32)
        buffer.policy_gradient(row_inputs(5, 130), CLIP, some_columns(CLIP, 5))
        assert torch.count_nonzero(storage[:, 130:]) == 0
        CHECKS["policy_loss"](BEYOND_FLOAT16, "triton")
        CHECKS["logprob"](NEAR_THE_CAP, "triton")
        CHECKS["logprob"](Case(device=DEVICE.type), "triton")
        if first:
            rows = {"num_rows": 24, "num_tokens": 31, "kl_weighted": True}
            CHECKS["policy_loss"](Case(objective=first, **rows, device=DEVICE.type), "triton")
        CHECKS["policy_loss"](BEYOND_THE_CLAMP, "triton")
        for case in EVERY_LOSS:
            CHECKS["policy_loss"](case, "triton")
        for _ in range(50):
            check = rng.choice(sorted(CHECKS))
            CHECKS[check](random_case(rng, check, device=DEVICE.type), "triton")
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", SEEDED_BUGS)
def test_the_suite_finds_the_seeded_bug(name, with_bug):
    assert suite_finds_something_wrong(with_bug(name), LOSS_OF_BUG.get(name))


def test_the_suite_finds_nothing_in_the_kernels_as_they_are():
    assert not suite_finds_something_wrong(rowwise)
