"""The block-sparse backward: what is kept, the products, and the loss that uses them."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import importlib.util
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, check_policy_loss, make_batch, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import shuffled_programs

from exgrpo_kernels import linear_policy_loss, runtime, sparse_backward

F64 = torch.float64
BACKENDS = ["torch"] + (["triton"] if runtime.is_interpreting() else [])

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if runtime.is_interpreting():
    from exgrpo_kernels import sparse_kernels


# ---- which tiles are kept ------------------------------------------------------------------------


def test_a_tile_is_kept_when_any_of_its_rows_has_the_mass():
    masses = torch.zeros(258, 3)
    masses[3, 0] = 0.2  # first group, first tile
    masses[130, 1] = 0.099  # just too light
    masses[257, 2] = 0.1  # the last group has two rows
    kept = sparse_backward.keep_tiles(masses, torch.tensor(2.0), 0.05)
    assert kept.tolist() == [[True, False, False], [False, False, False], [False, False, True]]


def test_what_is_not_a_number_is_never_dropped():
    masses = torch.zeros(64, 2)
    masses[5, 1] = math.nan
    kept = sparse_backward.keep_tiles(masses, torch.tensor(1.0), 0.05)
    assert kept.tolist() == [[False, True]]


def test_masses_and_threshold_zero_keep_everything():
    kept = sparse_backward.keep_tiles(torch.zeros(64, 2), torch.tensor(1.0), 0.0)
    assert kept.all()


def test_tile_sums_of_a_ragged_vocabulary():
    values = torch.arange(130.0)[None]
    expected = [[sum(range(64)), sum(range(64, 128)), 128 + 129]]
    assert sparse_backward.tile_sums(values).tolist() == expected


# ---- the products --------------------------------------------------------------------------------


def problem(seed: int, dtype=torch.float32, share: float | None = None):
    """dlogits, hidden, weight and a bitmap of any density, of awkward shapes."""
    rng = random.Random(seed)
    num_rows, num_columns = rng.choice([1, 127, 128, 300, 400]), rng.choice([1, 65, 128, 500])
    num_hidden = rng.choice([1, 8, 33])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    groups = -(-num_rows // 128), -(-num_columns // 64)
    share = rng.choice([0.0, 0.1, 0.5, 1.0]) if share is None else share
    kept = torch.rand(groups, generator=generator) < share
    return (
        normal(num_rows, num_columns),
        normal(num_rows, num_hidden),
        normal(num_columns, num_hidden),
        kept,
    )


def check_products(module, seed: int, dtype=torch.float32, share: float | None = None) -> None:
    """Both products against float64 of the masked gradient, overwriting and adding."""
    dlogits, hidden, weight, kept = problem(seed, dtype, share)
    masked = sparse_backward.masked_reference(dlogits.double(), kept)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    out = torch.full((len(hidden), hidden.shape[1]), math.nan, dtype=dtype)
    module.hidden_gradient_into(out, dlogits, weight, kept)
    expected = masked @ weight.double()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)
    for overwrite in (True, False):
        out = torch.full(weight.shape, math.nan if overwrite else 2.0)
        module.weight_gradient_add(out, dlogits, hidden, kept, overwrite=overwrite)
        expected = masked.t() @ hidden.double() + (0.0 if overwrite else 2.0)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("seed", range(40))
def test_products_in_pytorch(seed):
    check_products(sparse_backward, seed)


if runtime.is_interpreting():
    SEEDS = [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 40))]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_products_in_triton(seed, dtype):
        check_products(sparse_kernels, seed, dtype)

    def test_lists_name_what_is_needed_longest_first():
        needed = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
        entries, counts, order = sparse_kernels.lists_of(needed)
        assert counts.tolist() == [2, 0, 3] and order.tolist() == [2, 0, 1]
        assert entries[0, :2].tolist() == [1, 3] and entries[2, :3].tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("counts", "pieces"),
        [
            ([4, 4, 4], [1, 1, 1]),
            ([20, 1, 1, 1, 0], [2, 1, 1, 1, 0]),  # the mean is 23 / 4: cut at 12
            ([0, 0], [0, 0]),
            ([1], [1]),
        ],
    )
    def test_long_lists_are_cut_at_twice_the_mean(counts, pieces):
        needed = torch.arange(max(counts) or 1)[None] < torch.tensor(counts)[:, None]
        segments = sparse_kernels.segments_of(sparse_kernels.lists_of(needed))
        assert segments.pieces_I.tolist() == pieces
        total = int(segments.total)
        assert total == sum(pieces) <= 2 * len(counts)
        covered = {i: [] for i in range(len(counts))}
        for s in range(total):
            item = int(segments.items_S[s])
            covered[item] += range(int(segments.starts_S[s]), int(segments.stops_S[s]))
            first = int(segments.first_I[item])
            assert first <= s < first + pieces[item]
        assert covered == {i: list(range(count)) for i, count in enumerate(counts)}

    def test_the_order_of_programs_changes_no_bit(monkeypatch):
        dlogits, hidden, weight, kept = problem(11, share=0.4)
        outcomes = []
        for seed, programs in ((0, 6), (1, 6), (2, 3), (3, 1)):
            monkeypatch.setattr(runtime, "num_programs", lambda device, programs=programs: programs)
            dx, dw = torch.empty(len(hidden), hidden.shape[1]), torch.empty_like(weight)
            with shuffled_programs(seed):
                sparse_kernels.hidden_gradient_into(dx, dlogits, weight, kept)
                sparse_kernels.weight_gradient_add(dw, dlogits, hidden, kept, overwrite=True)
            outcomes.append((dx, dw))
        for dx, dw in outcomes[1:]:
            assert torch.equal(dx, outcomes[0][0]) and torch.equal(dw, outcomes[0][1])


# ---- the loss ------------------------------------------------------------------------------------


def gradients_of(case: Case, backend: str, batch=None, **arguments):
    batch = make_batch(case) if batch is None else batch
    hidden, weight = (t.detach().clone().requires_grad_() for t in (batch.hidden, batch.weight))
    result = linear_policy_loss(
        hidden,
        weight,
        batch.targets,
        bias=batch.bias,
        temperature=batch.temperature,
        softcap=case.softcap,
        objective=batch.objective,
        backend=backend,
        **batch.columns,
        **arguments,
    )
    return result, *torch.autograd.grad(result.loss, [hidden, weight])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", ["clip", "everything", "gspo"])
def test_threshold_zero_is_the_dense_result(backend, objective):
    case = Case(objective=objective, num_rows=140, num_tokens=200, masked=0.3, silent=0.2)
    dense, *expected = gradients_of(case, backend, sparsity="off")
    sparse, *ours = gradients_of(case, backend, sparsity=0.0)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * b.abs().max().item())
    for name in ("logprobs", "entropy", "ratio"):  # in the order of the caller
        torch.testing.assert_close(getattr(sparse, name), getattr(dense, name))
    assert sparse.metrics["density"] == 1 and sparse.metrics["skipped_mass"] == 0
    assert sparse.metrics["rows_skipped"] == dense.metrics["rows_skipped"]


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
PAIRS = [(BRAIN, BRAIN), (HALF, HALF), (FULL, FULL), (FULL, BRAIN), (BRAIN, FULL), (HALF, FULL)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "weight"), PAIRS)
def test_any_pair_of_dtypes(hidden, weight, backend):
    case = Case(num_rows=40, num_tokens=200, num_hidden=8, dtype=hidden, weight_dtype=weight)
    check_policy_loss(case, backend, sparsity=1e-7)


def certain_batch(seed: int = 0):
    """256 rows, most of them nearly certain of their target, over 2,000 tokens with a common mean."""
    case = Case(seed=seed, num_rows=256, num_tokens=2000, num_hidden=32, scale=0.2)
    batch = make_batch(case)
    generator = torch.Generator().manual_seed(seed)
    batch.weight += 0.3 * torch.randn(1, 32, generator=generator)
    centred = batch.weight[batch.targets] - batch.weight.mean(0)
    confident = torch.rand(256, 1, generator=generator) < 0.85
    pull = torch.where(confident, 25.0, 8.0) * centred / centred.square().sum(-1, keepdim=True)
    batch.hidden = batch.hidden + pull
    batch.columns["behaviour_logprobs"] = linear_logprobs(batch)
    return case, batch


def linear_logprobs(batch) -> torch.Tensor:
    logits = batch.hidden @ batch.weight.t()
    return logits.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


@functools.cache
def dense_gradients(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `certain_batch`."""
    case, batch = certain_batch()
    _, dx, dw = gradients_of(case, backend, batch, sparsity="off")
    return dx, dw


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_is_small_where_most_tiles_are_dropped(backend):
    case, batch = certain_batch()
    dx, dw = dense_gradients(backend)
    errors, densities = [], []
    for threshold in (1e-3, 1e-4, 1e-5):
        result, ours_dx, ours_dw = gradients_of(case, backend, batch, sparsity=threshold)
        errors.append(max(relative(ours_dx, dx), relative(ours_dw, dw)))
        densities.append(result.metrics["density"].item())
        assert 0 <= result.metrics["skipped_mass"] < 20 * threshold
    assert densities[0] < densities[1] <= densities[2] and densities[0] < 0.9
    assert errors[0] > errors[2] and errors[1] < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_tails(backend):
    case, batch = certain_batch()
    dx, dw = dense_gradients(backend)
    found = {}
    for tail in sparse_backward.TAILS:
        _, a, b = gradients_of(case, backend, batch, sparsity=5e-2, tail=tail)
        found[tail] = relative(a, dx), relative(b, dw)
    assert found["centroid"][0] < 0.7 * found["drop"][0]
    assert found["centroid"][1] < found["drop"][1]
    assert found["dense_dw"][1] < 1e-5 < found["dense_dw"][0] == pytest.approx(found["drop"][0])


@pytest.mark.parametrize("vocab", [128, 150])
def test_centroids_of_several_chunks(vocab):
    """Against W and dW whose rows are those means, tile by tile, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, total = draw(vocab, 5), draw(vocab, 5)
    tiles = torch.arange(vocab).split(sparse_backward.COLUMNS)
    flat = torch.cat([weight[rows].mean(0).expand(len(rows), -1) for rows in tiles])
    centroids, expected = sparse_backward.Centroids(), total.clone()
    for _ in range(3):
        dz, hidden = draw(4, vocab), draw(4, 5)
        residue = sparse_backward.tile_sums(dz)
        torch.testing.assert_close(centroids.of_hidden(residue, weight), dz @ flat)
        for rows in tiles:
            expected[rows] += (dz[:, rows].t() @ hidden).mean(0)
        centroids.add_for_weight(residue, hidden)
    centroids.spread_into(total)
    torch.testing.assert_close(total, expected)


def test_the_centroid_tail_reads_the_head_once(monkeypatch):
    case, batch = certain_batch()
    seen, tile_means = [], sparse_backward.tile_means
    monkeypatch.setattr(
        sparse_backward, "tile_means", lambda w, dtype: seen.append(dtype) or tile_means(w, dtype)
    )
    gradients_of(case, "torch", batch, sparsity=5e-2, tail="centroid", chunk_rows=100)
    assert seen == [torch.float32]


def test_what_was_skipped_is_what_was_skipped():
    """`skipped_mass` against the dropped elements themselves, in plain PyTorch."""
    case, batch = certain_batch(1)
    result, *_ = gradients_of(case, "torch", batch, sparsity=1e-2)
    advantages = batch.columns["advantages"] * batch.columns["weights"]
    p = (batch.hidden @ batch.weight.t()).double().softmax(-1)
    dz = -advantages[:, None].double() * (torch.nn.functional.one_hot(batch.targets, 2000) - p)
    from exgrpo_kernels.objective import LossColumns
    from exgrpo_kernels.policy_loss import row_order

    checked = LossColumns(**batch.columns).checked(batch.objective, 256, torch.float32, p.device)
    order = row_order(batch.objective, checked, batch.targets)
    masses = sparse_backward.tile_sums(dz.abs())[order]
    kept = sparse_backward.keep_tiles(masses, advantages.abs().mean(), 1e-2)
    dropped = sparse_backward.residues(masses, kept).sum() / masses.sum()
    assert result.metrics["skipped_mass"].item() == pytest.approx(dropped.item(), rel=1e-3)
    assert 1e-4 < dropped < 0.2


@pytest.mark.parametrize(
    ("backend", "examples"),
    [(backend, 15) for backend in BACKENDS]
    + [pytest.param(backend, 150, marks=pytest.mark.slow) for backend in BACKENDS],
)
def test_any_case_is_dense_where_nothing_was_skipped(backend, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(
        rng=st.randoms(use_true_random=False),
        threshold=st.sampled_from([0.0, 1e-4, 1e-2, 0.3]),
        tail=st.sampled_from(["drop", "dense_dw"]),
    )
    def run(rng, threshold, tail) -> None:
        case = random_case(rng, "policy_loss")
        case = Case(**(vars(case) | {"dtype": torch.float32, "logits_dtype": None}))
        batch = make_batch(case)
        dense, dx, dw = gradients_of(case, backend, batch, sparsity="off")
        sparse, ours_dx, ours_dw = gradients_of(case, backend, batch, sparsity=threshold, tail=tail)
        torch.testing.assert_close(sparse.loss, dense.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sparse.logprobs, dense.logprobs, equal_nan=True)
        close = {"rtol": 1e-3, "atol": 1e-4}
        if sparse.metrics["skipped_mass"] == 0:
            torch.testing.assert_close(ours_dx, dx, **close)
            torch.testing.assert_close(ours_dw, dw, **close)
        elif tail == "dense_dw":
            torch.testing.assert_close(ours_dw, dw, **close)
        assert threshold > 0 or sparse.metrics["skipped_mass"] == 0

    run()


# ---- when it is used -----------------------------------------------------------------------------


def test_auto_leaves_small_vocabularies_and_dense_gradients_alone(monkeypatch):
    case, batch = certain_batch()
    off = gradients_of(case, "torch", batch, sparsity="off")
    auto = gradients_of(case, "torch", batch, sparsity="auto")
    assert all(torch.equal(a, b) for a, b in zip(auto[1:], off[1:], strict=True))
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 1)
    monkeypatch.setattr(runtime, "BREAK_EVEN_DENSITY", 0.0)
    dense = gradients_of(case, "torch", batch, sparsity="auto")[0]
    assert dense.metrics["skipped_mass"] == 0 and dense.metrics["density"] == 1
    monkeypatch.setattr(runtime, "BREAK_EVEN_DENSITY", 1.0)
    sparse = gradients_of(case, "torch", batch, sparsity="auto")[0]
    assert sparse.metrics["skipped_mass"] > 0 and sparse.metrics["density"] < 1


def test_auto_is_off_where_bits_have_to_be_the_same(monkeypatch):
    monkeypatch.setattr(runtime, "SPARSE_VOCABULARY", 1)
    monkeypatch.setattr(runtime, "BREAK_EVEN_DENSITY", 1.0)
    case, batch = certain_batch()
    torch.use_deterministic_algorithms(True)
    try:
        result = gradients_of(case, "torch", batch, sparsity="auto")[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.metrics["density"] == 1 and result.metrics["skipped_mass"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_skipped_counts_silent_and_masked_and_clipped_rows(backend):
    batch = make_batch(Case(num_rows=8))
    batch.columns["weights"] = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1])
    batch.columns["advantages"] = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1])
    exact = linear_logprobs(batch)
    batch.columns["behaviour_logprobs"] = exact - torch.tensor([0, 0, 0, 5.0, 0, 0, 0, 0])
    for sparsity in ("off", 1e-4):
        result = gradients_of(Case(num_rows=8), backend, batch, sparsity=sparsity)[0]
        assert result.metrics["rows_skipped"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": "on"}, ["sparsity", "auto, off", "'on'"]),
        ({"sparsity": -0.1}, ["sparsity", "[0, 1)", "-0.1"]),
        ({"sparsity": True}, ["sparsity", "True"]),
        ({"tail": "cut"}, ["tail", "drop, centroid, dense_dw", "'cut'"]),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        gradients_of(Case(), "torch", **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- seeded bugs ---------------------------------------------------------------------------------

SEEDED_BUGS = {
    "last_tile_of_a_list_forgotten": (
        "for k in range(start, stop):",
        "for k in range(start, stop - 1):",
    ),
    "rows_of_another_item": ("rows = item * BLOCK_ROWS", "rows = segment * BLOCK_ROWS"),
    "segments_added_once": ("for piece in range(0, count):", "for piece in range(0, 1):"),
    "empty_columns_keep_old_values": ("        elif OVERWRITE:\n", "        elif num_rows < 0:\n"),
    "overwrites_where_it_should_add": ("if not OVERWRITE:", "if num_rows < 0:"),
    "counts_in_the_wrong_order": (
        "count = tl.load(counts + item)",
        "count = tl.load(counts + work // num_parts)",
    ),
}


if runtime.is_interpreting():

    @pytest.mark.parametrize("name", SEEDED_BUGS)
    def test_the_suite_finds_the_seeded_bug(name, tmp_path):
        source = Path(sparse_kernels.__file__).read_text()
        right, wrong = SEEDED_BUGS[name]
        assert source.count(right) == 1, f"{name}: the text to break is not there once"
        path = tmp_path / "broken_kernels.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("broken_kernels", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["broken_kernels"] = module
        spec.loader.exec_module(module)
        with pytest.raises(AssertionError):
            for seed in range(40):
                check_products(module, seed)
