"""The gradient of the language-model head, summed where it is wanted, with no copy beside it.

The fused loss makes dW [V, D] in float32. It is the largest gradient of all, and autograd would hold
it up to three times: the sum, the sum in the weight's dtype, and `.grad`. Here the loss adds to
`.grad` itself where that is float32, else to a sum that is added to `.grad` at once, rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 4096  # at a time: a CPU widens both to add them


@contextlib.contextmanager
def summed_in_place(weight: Tensor) -> Iterator[Tensor | None]:
    """float32 [V, D], the `weight_main_grad` of one loss on the head `weight`.

    None where autograd has to do it: a frozen head, and float64, which the loss cannot add to. The
    loss must be differentiated with an upstream gradient of 1.
    """
    if not weight.requires_grad or weight.dtype == torch.float64:
        yield None
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    if weight.dtype == torch.float32:
        yield weight.grad
        return
    total_VD = torch.zeros_like(weight, dtype=torch.float32)
    yield total_VD
    for grad, total in zip(weight.grad.split(ROWS), total_VD.split(ROWS), strict=True):
        grad += total
