"""One of several processes that hold a head together: how far it is from the whole head's results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from cases import F64, OBJECTIVES, Batch, Case, make_batch
from several_processes import met
from torch import Tensor

from exgrpo_kernels import (
    linear_logprob,
    linear_policy_loss,
    runtime,
    vocab_parallel_linear_logprob,
    vocab_parallel_policy_loss,
)

# 131 is odd, and so are the parts of it.
CASE = Case(num_rows=23, num_tokens=131, num_hidden=8)
CASES = {name: replace(CASE, objective=name, masked=0.2, silent=0.1) for name in OBJECTIVES}
CASES |= {
    "softcap": replace(CASE, objective="everything", softcap=3.0, temperature="rows"),
    "bias": replace(CASE, objective="everything", bias="all", temperature=0.7),
    "absent": replace(CASE, objective="everything", bias="absent"),
    "absent_part": replace(CASE, objective="entropy", bias="absent"),
    "shaped": replace(CASE, shaped=True),
    "dirty": replace(CASE, masked=0.5, dirty=True),
    "certain": replace(CASE, objective="entropy", certain=True),
    "all_masked": replace(CASE, masked=2.0),
    "no_rows": replace(CASE, num_rows=0),
    "one_row": replace(CASE, num_rows=1),
}


def batch_of(name: str, dtype: torch.dtype, parts: list[slice]) -> Batch:
    batch = make_batch(replace(CASES[name], dtype=dtype))
    if dtype == F64:
        batch.columns = {
            k: c if k == "sequence_ids" else c.double() for k, c in batch.columns.items()
        }
    if name == "absent_part":  # the second process holds padding alone
        assert batch.bias is not None
        batch.targets.clamp_(max=parts[0].stop - 1)
        batch.bias[batch.targets] = 0.5
        batch.bias[parts[1]] = -torch.inf
    return batch


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def results(
    function: Callable[..., Any], batch: Batch, case: Case, rows: slice, whole: bool, **more: Any
) -> dict[str, Tensor]:
    """Loss, vectors and gradients; dW and db of the rows of this process."""
    hidden = leaf(batch.hidden)
    part = slice(None) if whole else rows
    weight = leaf(batch.weight[part])
    bias = None if batch.bias is None else leaf(batch.bias[part])
    same: dict[str, Any] = {
        "bias": bias,
        "temperature": batch.temperature,
        "softcap": case.softcap,
        "backend": "torch",
        **more,
    }
    if function in (linear_logprob, vocab_parallel_linear_logprob):
        targets = batch.targets.clamp(min=0)
        found = function(hidden, weight, targets, **same)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(3, len(hidden), generator=generator, dtype=hidden.dtype)
        loss = sum((u * o).mean() for u, o in zip(upstream, found, strict=True) if len(o))
        loss = loss + 0.0 * hidden.sum()  # a tensor for no rows, too
        outputs = {name: value.detach() for name, value in found._asdict().items()}
    else:
        if function is linear_policy_loss:
            same["sparsity"] = "off"
        found = function(
            hidden, weight, batch.targets, objective=batch.objective, **batch.columns, **same
        )
        loss, clean = found.loss, batch.columns["weights"] != 0
        outputs = {n: getattr(found, n)[clean] for n in ("logprobs", "entropy", "ratio")}
        outputs |= found.metrics
    assert isinstance(loss, Tensor)
    outputs["loss"] = loss.detach()
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    names = ["dhidden", "dweight", "dbias"]
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)  # no rows use no weight
    for name, gradient in zip(names, gradients, strict=False):
        outputs[name] = gradient[rows] if whole and name != "dhidden" else gradient
    return outputs


def errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The greatest distance, where an expected value above 1 counts as 1."""
    found = {}
    for name in ours.keys() & expected.keys():
        a, b = ours[name].double(), expected[name].double()
        assert a.shape == b.shape, (name, a.shape, b.shape)
        size = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        same = (a == b) | ((a - b).abs() < torch.inf)
        assert bool(same.all()), f"{name}: {a} {b}"
        found[name] = float((a - b).abs().nan_to_num(0.0).max()) / size if a.numel() else 0.0
    return found


def refusal(parts: list[slice], rank: int, target: int) -> str:
    """What a call says whose target is in no part, or in two."""
    batch = make_batch(CASE)
    targets = batch.targets.clone()
    targets[3] = target
    try:
        vocab_parallel_linear_logprob(
            batch.hidden,
            batch.weight[parts[rank]],
            targets,
            vocab_start=parts[rank].start,
            backend="torch",
        )
    except ValueError as error:
        return str(error)
    return "accepted"


def every_comparison(rank: int, count: int) -> dict[str, Any]:
    runtime.chunk_rows = lambda num_rows, row_bytes, device: 5  # several chunks, the last one short
    cuts = [0, 57, 131] if count == 2 else [0, 1, 90, 131]
    parts = [slice(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
    report: dict[str, Any] = {}
    for dtype in (torch.float32, F64):
        for name in CASES:
            case, batch = CASES[name], batch_of(name, dtype, parts)
            start = {"vocab_start": parts[rank].start, "group": dist.group.WORLD}
            for what, ours, whole in (
                ("loss", vocab_parallel_policy_loss, linear_policy_loss),
                ("logprob", vocab_parallel_linear_logprob, linear_logprob),
            ):
                if what == "logprob" and name == "dirty":
                    continue
                found = results(ours, batch, case, parts[rank], False, **start)
                expected = results(whole, batch, case, parts[rank], True)
                assert "dweight" in found
                report[f"{what} {name} {str(dtype).split('.')[1]}"] = errors(found, expected)
    report["nobody's target"] = refusal(parts, rank, 131)
    overlapping = [slice(0, 131)] * count
    report["everybody's target"] = refusal(overlapping, rank, 5)
    return report


if __name__ == "__main__":
    with met(sys.argv[1:]) as processes:
        print(json.dumps(every_comparison(processes.place.rank, processes.count)))
