"""The kernels on a real GPU: the shapes they are for, the same bits every time, no host waits."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

from __future__ import annotations

import random

import pytest
import torch
from cases import CHECKS, OBJECTIVES, Case, make_batch, random_case

from exgrpo_kernels import PolicyObjective, linear_policy_loss, linear_policy_loss_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reduced_every_loss(objective):
    """Small enough for a memory checker."""
    case = Case(objective=objective, num_rows=7, shaped=True, masked=0.3, dirty=True, device="cuda")
    CHECKS["policy_loss"](case, "triton")


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed):
    rng = random.Random(seed)
    check = rng.choice(sorted(CHECKS))
    CHECKS[check](random_case(rng, check, device="cuda"), "triton")


def production_batch(tokens: int = 1024, vocab: int = 151_936, hidden: int = 1536):
    case = Case(
        num_rows=tokens,
        num_tokens=vocab,
        num_hidden=hidden,
        dtype=torch.bfloat16,
        masked=0.2,
        silent=0.2,
        device="cuda",
    )
    return make_batch(case)


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_production_shape_is_no_worse_than_twice_plain_pytorch(logits_dtype):
    batch = production_batch()
    columns = {k: c for k, c in batch.columns.items() if k != "sequence_ids"}
    errors = {}
    truth = None
    for name, function, dtype in (
        ("truth", linear_policy_loss_reference, torch.float64),
        ("plain", linear_policy_loss_reference, torch.bfloat16),
        ("ours", linear_policy_loss, torch.bfloat16),
    ):
        hidden = batch.hidden.to(dtype).detach().requires_grad_()
        weight = batch.weight.to(dtype).detach().requires_grad_()
        wide = {k: c.to(torch.promote_types(dtype, c.dtype)) for k, c in columns.items()}
        more = {"logits_dtype": logits_dtype} if name == "ours" else {}
        result = function(hidden, weight, batch.targets, **wide, **more)
        result.loss.backward()
        values = (result.logprobs, hidden.grad, weight.grad)
        if truth is None:
            truth = [v.double() for v in values]
        else:
            errors[name] = [
                ((v.double() - t).norm() / t.norm()).item()
                for v, t in zip(values, truth, strict=True)
            ]
        torch.cuda.empty_cache()
    for ours, plain in zip(errors["ours"], errors["plain"], strict=True):
        assert ours <= 2 * plain + 1e-6, errors


def test_250_runs_give_the_same_bits():
    """Under a fixed threshold: "auto" decides by a density that arrives when it arrives."""
    batch = production_batch(tokens=512, vocab=32_000, hidden=512)
    objective = PolicyObjective(entropy_coef=0.01)
    first = None
    for _ in range(250):
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        columns = {k: c for k, c in batch.columns.items() if k != "sequence_ids"}
        result = linear_policy_loss(
            hidden, weight, batch.targets, objective=objective, sparsity=1e-4, **columns
        )
        result.loss.backward()
        outcome = (result.loss.detach(), result.logprobs, hidden.grad, weight.grad)
        if first is None:
            first = outcome
        assert all(torch.equal(a, b) for a, b in zip(outcome, first, strict=True))


@pytest.mark.parametrize("ids_device", ["cpu", "cuda"])
def test_the_host_never_waits(ids_device):
    """Several chunks, sequence ids of either device."""
    batch = production_batch(tokens=512, vocab=32_000, hidden=512)
    columns = batch.columns | {"sequence_ids": batch.columns["sequence_ids"].to(ids_device)}
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def step():
        loss = linear_policy_loss(hidden, weight, batch.targets, chunk_rows=128, **columns).loss
        loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_at_a_chunk_and_the_accumulator():
    batch = production_batch(tokens=8192, vocab=151_936, hidden=1536)
    columns = {k: c for k, c in batch.columns.items() if k != "sequence_ids"}
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_policy_loss(
        hidden, weight, batch.targets, logits_dtype=torch.bfloat16, **columns
    ).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    chunk, accumulator = 2 * 4416 * 151_936, 4 * weight.numel()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert extra <= 1.05 * (chunk + accumulator + 2 * gradients)
