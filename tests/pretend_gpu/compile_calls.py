"""Public calls as a GPU's launcher would compile them: python compile_calls.py CAPABILITY

Prints JSON: {"failed": {call: error}, "compiles": {kernel: specialisations in 20 steps}}. In a process
of its own, as Triton decides when it is imported whether kernels are Python.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pretend_gpu.kernels import compiled_for
from pretend_gpu.machine import pretend_gpu
from torch import Tensor

from exgrpo_kernels import (
    PolicyObjective,
    linear_logprob,
    linear_policy_loss,
    policy_loss_from_logits,
)

ROWS, VOCAB, HIDDEN = 40, 9000, 64  # above the vocabulary from which "auto" looks at tiles
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, FP32)]
OPTIONS: dict[str, dict[str, Any]] = {
    "soft cap, temperatures, bias": {"softcap": 30.0, "temperature": None, "bias": None},
    "KL and entropy": {"kl_coef": 0.1, "entropy_coef": 0.1, "ref_logprobs": None},
    "centroids": {"sparsity": 1e-4, "tail": "centroid"},
    "bfloat16 logits": {"logits_dtype": BF16},
    "numbers as int": {"clip_low": 1, "clip_high": 2, "dual_clip": 3, "entropy_coef": 1},
    "sequence": {"ratio_level": "sequence"},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
    "reinforce": {"surrogate": "reinforce"},
}
OF_OBJECTIVE = set(PolicyObjective.__dataclass_fields__)


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def columns(rows: int) -> dict[str, Tensor]:
    ones = torch.ones(rows, device="cuda")
    return {"advantages": ones, "behaviour_logprobs": -ones, "weights": ones}


def policy(rows: int = ROWS, pair: Any = (BF16, BF16), **options: Any) -> None:
    """Forward and backward; None stands for a tensor of the right size."""
    fields = {name: options.pop(name) for name in OF_OBJECTIVE & options.keys()}
    sizes = {"temperature": rows, "ref_logprobs": rows, "bias": VOCAB}
    for name in sizes.keys() & options.keys():
        options[name] = torch.ones(sizes[name], device="cuda")
    if fields.get("ratio_level") == "sequence":
        options["sequence_ids"] = torch.zeros(rows, dtype=torch.int64)
    hidden, weight = leaf(rows, HIDDEN, dtype=pair[0]), leaf(VOCAB, HIDDEN, dtype=pair[1])
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
    objective = PolicyObjective(**fields)
    result = linear_policy_loss(
        hidden, weight, targets, objective=objective, **columns(rows), **options
    )
    result.loss.backward()


def logprob(rows: int = ROWS, pair: Any = (BF16, BF16)) -> None:
    hidden, weight = leaf(rows, HIDDEN, dtype=pair[0]), leaf(VOCAB, HIDDEN, dtype=pair[1])
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
    out = linear_logprob(hidden, weight, targets)
    (out.logprobs.sum() + out.entropy.sum()).backward()


def from_logits(dtype: torch.dtype) -> None:
    logits = leaf(ROWS, VOCAB, dtype=dtype) * 1
    targets = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    given: Any = columns(ROWS)
    policy_loss_from_logits(logits, targets, **given)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    for pair, sparsity in itertools.product(PAIRS, ("off", 1e-4)):
        yield f"policy {pair} sparsity {sparsity}", partial(policy, pair=pair, sparsity=sparsity)
    for name, options in OPTIONS.items():
        yield name, partial(policy, **options)
    for pair in PAIRS[:3]:
        yield f"log-prob {pair}", partial(logprob, pair=pair)
        yield f"from logits {pair[0]}", partial(from_logits, pair[0])


def first_error(call: Callable[[], None]) -> str | None:
    try:
        call()
    except Exception as error:  # of the compiler, in any form
        return f"{type(error).__name__}: {str(error.__cause__ or error)[-300:]}"
    return None


def main() -> None:
    capability = int(sys.argv[1])
    torch.set_num_threads(1)
    with pretend_gpu(), compiled_for(capability) as found:
        failed = {name: why for name, call in calls() if (why := first_error(call))}
        found.clear()
        for step in range(20):  # lengths of a run
            policy(1 + 37 * step, sparsity=1e-4)
        compiles = {name: len(made) for name, made in found.items()}
    print(json.dumps({"failed": failed, "compiles": compiles}))


if __name__ == "__main__":
    main()
