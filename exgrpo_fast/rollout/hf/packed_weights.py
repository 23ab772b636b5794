"""Linear layers in oneDNN's own layout of their weights, while completions are generated on a CPU.

A product with few rows reads its weight once for each of them: in the layout of a matrix MKL reaches 60 to
80 % of the rate that oneDNN reaches in its own. Making the copies costs about as much as one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Tokens of a generation that is worth the copies; the check of the forward pass has as many.
LEAST_TOKENS = 3
# Of a weight: below, calling oneDNN costs more than its layout saves (128 x 512 and 32 rows: 7 % more than
# MKL; 576 x 576 and 64 rows: 11 % less).
LEAST_ELEMENTS = 2**17


def has_products_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in it on this machine: bfloat16 needs AVX-512 or its like."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@contextmanager
def packed_weights(
    model: nn.Module, *, rows: int, dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Inside, the large linear layers of `model` on a CPU multiply by packed copies of their weights.

    `rows`: of most products, a hint. `dtype`: of the copies and products. Nothing may require a gradient, and
    no weight may change inside. The copies are freed at the end.
    """
    layers: list[Any] = [module for module in model.modules() if can_be_packed(module, dtype)]
    layers = [layer for layer in layers if layer.weight.numel() >= LEAST_ELEMENTS]
    try:
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            layer.forward = partial(linear, pack(layer.weight.detach().to(dtype), rows), bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def can_be_packed(module: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether it is a plain linear layer of float32 or `dtype` on the CPU, and not packed already."""
    return (
        type(module) is nn.Linear
        and torch.backends.mkldnn.is_available()
        and type(module.weight) in (nn.Parameter, Tensor)
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, dtype)
        and "forward" not in vars(module)
    )


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy in oneDNN's layout. `rows`: of most products, a hint."""
    reorder: Any = torch.ops.mkldnn._reorder_linear_weight
    return reorder(weight, rows)


def linear(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """[..., D] -> [..., V], in the dtype of `packed`."""
    return torch.ops.mkldnn._linear_pointwise(rows.to(packed.dtype), packed, bias, "none", [], "")
