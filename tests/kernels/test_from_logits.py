"""`policy_loss_from_logits`, `weight_main_grad`, `logits_dtype` and chunks that follow sequences."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CHECKS, OBJECTIVES, Case, make_batch, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_policy_loss,
    policy_loss_from_logits,
    runtime,
)
from exgrpo_kernels.objective import LossColumns
from exgrpo_kernels.policy_loss import sequence_plan

CPU = torch.device("cpu")
BACKENDS = ["torch"] + (["triton"] if runtime.is_interpreting() else [])
KERNELS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("check", sorted(CHECKS))
def test_plain_pytorch_keeps_the_rule_of_the_kernels(check, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(rng=st.randoms(use_true_random=False))
    def run(rng) -> None:
        CHECKS[check](random_case(rng, check), "torch")

    run()


# ---- logits that exist already -------------------------------------------------------------------


def small_batch(**changes):
    batch = make_batch(Case(num_rows=6, num_tokens=70, **changes))
    return batch, {k: c for k, c in batch.columns.items() if k != "sequence_ids"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_memory_of_the_logits(backend, dtype):
    batch, columns = small_batch()
    leaf = (batch.hidden @ batch.weight.t()).to(dtype).requires_grad_()
    logits = leaf * 1.0
    result = policy_loss_from_logits(logits, batch.targets, backend=backend, **columns)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert torch.equal(gradient, logits.detach()) and gradient.dtype == dtype
    again = leaf * 1.0
    kept = again.detach().clone()
    apart = policy_loss_from_logits(
        again, batch.targets, in_place=False, backend=backend, **columns
    )
    assert torch.equal(again.detach(), kept)
    assert torch.equal(torch.autograd.grad(apart.loss, again)[0], gradient)


def test_autograd_refuses_to_use_logits_that_are_gone():
    batch, columns = small_batch()
    logits = (batch.hidden @ batch.weight.t()).requires_grad_() * 1.0
    other = logits.square().sum()  # saves the logits
    policy_loss_from_logits(logits, batch.targets, **columns)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(6), ["logits", "[N, V]", "[6]"]),
        (torch.zeros(6, 70, dtype=torch.int64), ["logits", "int64"]),
        (torch.zeros(70, 6).t(), ["logits", "contiguous", "strides"]),
    ],
)
def test_bad_logits_are_named(logits, words):
    batch, columns = small_batch()
    with pytest.raises(ValueError) as error:
        policy_loss_from_logits(logits, batch.targets, **columns)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- the weight's own gradient buffer ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", ["clip", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_weight_gradient_unrounded(monkeypatch, backend, objective, dtype):
    monkeypatch.setattr(runtime, "CHUNK_BYTES", 2 * 70 * 4)
    monkeypatch.setattr(runtime, "EFFICIENT_ROWS", 1)
    batch = make_batch(Case(num_rows=6, num_tokens=70, dtype=dtype))
    arguments = {"objective": PolicyObjective(**OBJECTIVES[objective]), "backend": backend}
    weight = batch.weight.clone().requires_grad_()
    linear_policy_loss(
        batch.hidden, weight, batch.targets, **batch.columns, **arguments
    ).loss.backward()
    apart = batch.weight.clone().requires_grad_()
    main_grad = torch.ones(70, 4)
    hidden = batch.hidden.clone().requires_grad_()
    linear_policy_loss(
        hidden, apart, batch.targets, weight_main_grad=main_grad, **batch.columns, **arguments
    ).loss.backward()
    assert apart.grad is None and hidden.grad is not None and weight.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(main_grad - 1, weight.grad.float(), rtol=tolerance, atol=tolerance)


def test_a_main_grad_that_does_not_fit_is_named():
    batch, columns = small_batch()
    for wrong in (
        torch.zeros(70, 4, dtype=torch.bfloat16),
        torch.zeros(4, 70),
        torch.zeros(4, 70).t(),
    ):
        with pytest.raises(ValueError, match=r"weight_main_grad must be float32 \[70, 4\]"):
            linear_policy_loss(
                batch.hidden, batch.weight, batch.targets, weight_main_grad=wrong, **columns
            )


# ---- rounding the logits -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_logits_are_those_of_an_engine_that_rounds(backend):
    hidden, weight = torch.full((1, 1), 8.0), torch.tensor([[1.003], [1.0], [0.5]])
    targets = torch.zeros(1, dtype=torch.int64)
    rounded = linear_logprob(hidden, weight, targets, logits_dtype=torch.bfloat16, backend=backend)
    exact = linear_logprob(hidden, weight, targets, backend=backend)
    # 8.024 becomes 8.0 in bfloat16, whose steps are 1/16 there
    assert rounded.logprobs.item() == pytest.approx(-0.7023, abs=2e-4)
    assert exact.logprobs.item() == pytest.approx(-0.6902, abs=2e-4)
    with pytest.raises(ValueError, match="logits_dtype"):
        linear_logprob(hidden, weight, targets, logits_dtype=torch.float16)


# ---- chunks that follow the sequences ------------------------------------------------------------


def columns_of(ids: list[int], weights: list[float] | None = None):
    n = len(ids)
    ones = torch.ones(n)
    weights_N = ones if weights is None else torch.tensor(weights)
    columns = LossColumns(ones, ones, weights_N, sequence_ids=torch.tensor(ids))
    return columns.checked(PolicyObjective(ratio_level="sequence"), n, torch.float32, CPU)


@pytest.mark.parametrize(
    ("ids", "weights", "size", "ends"),
    [
        ([0, 0, 1, 1, 2, 2], None, 4, [4, 6]),
        ([5, 5, 5, 3, 3, 4], None, 3, [3, 6]),
        ([0, 0, 1, 1, 2, 2], None, 6, [6]),
        ([0, 0, 0, 0, 1, 1], None, 3, None),  # a sequence longer than a chunk
        ([0, 1, 0, 1, 0, 1], None, 4, None),  # sequences in pieces
        (
            [0, 9, 0, 1, 9, 1],
            [1.0, 0.0, 1.0, 1.0, 0.0, 1.0],
            3,
            [3, 6],
        ),  # untrained rows belong anywhere
        ([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], 3, [3, 4]),
    ],
)
def test_chunks_follow_sequences(ids, weights, size, ends):
    plan = sequence_plan(columns_of([i % len(ids) for i in ids], weights), len(ids), size)
    if ends is None:
        assert plan is None
    else:
        assert plan == [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_sequences_in_chunks_make_no_logits_twice(monkeypatch, backend):
    """Three GEMMs where sequences fit a chunk, four where they do not; the same numbers."""
    calls = []
    original = runtime.logits_into

    def counted(out, hidden, weight):
        calls.append(len(out))
        original(out, hidden, weight)

    monkeypatch.setattr(runtime, "logits_into", counted)
    monkeypatch.setattr(runtime, "EFFICIENT_ROWS", 1)
    batch = make_batch(Case(num_rows=12, num_tokens=70, objective="gspo", seed=3))
    gradients = []
    for rows, expected in ((12, [12]), (6, [6, 6]), (2, [2] * 12)):
        monkeypatch.setattr(runtime, "CHUNK_BYTES", rows * 70 * 4)
        calls.clear()
        hidden = batch.hidden.clone().requires_grad_()
        result = linear_policy_loss(
            hidden,
            batch.weight,
            batch.targets,
            objective=batch.objective,
            backend=backend,
            **batch.columns,
        )
        gradients.append(torch.autograd.grad(result.loss, hidden)[0])
        assert calls == expected or (rows == 2 and sum(calls) > 12)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


# ---- the example of docs/kernels.md --------------------------------------------------------------


class TinyModel(torch.nn.Module):
    """`model.model(ids, attention_mask=...).last_hidden_state` and `model.lm_head`, as in HF."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.lm_head = torch.nn.Linear(8, 50, bias=False)

    def model(self, ids, attention_mask):
        states = (self.embedding(ids) * attention_mask[..., None]).cumsum(1)
        return SimpleNamespace(last_hidden_state=torch.tanh(states))


def test_the_example_of_the_page_is_the_loss_of_full_logits():
    found = re.search(r"```python\n(.*?)```", KERNELS_PAGE.read_text(), re.S)
    assert found is not None
    names: dict = {}
    exec(found[1], names)
    torch.manual_seed(0)
    model = TinyModel()
    inputs = {
        "prompt_ids": torch.randint(50, (3, 4)),
        "prompt_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]),
        "completion_ids": torch.randint(50, (3, 5)),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -0.5, 0.3]),
        "old_per_token_logps": -4 + 0.3 * torch.randn(3, 5),
    }
    names["compute_loss"](model, inputs).loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model.lm_head(model.model(ids, mask).last_hidden_state)[:, 3:-1]
    logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    advantages = inputs["advantages"][:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    trained = inputs["completion_mask"]
    ((losses * trained).sum() / trained.sum()).backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        assert parameter.grad is not None and gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
