"""How the linear layers of a frozen model are held: in the compute dtype, or in 4 bits (QLoRA)."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exgrpo_fast.core.errors import UserError


def hold_linear_layers_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights of all linear layers but the head, in place.

    Autocast casts a weight that requires no gradient anew in each pass, and in generation at each
    token. What the passes give has the same bits: embeddings and norms, which autocast does not
    cast, stay as they are.
    """
    head = model.get_output_embeddings()
    for layer in model.modules():
        if not isinstance(layer, (nn.Linear, Conv1D)) or layer is head:
            continue
        weight = cast("nn.Parameter", layer.weight)
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def nf4(compute_dtype: torch.dtype, *, device: str) -> Any:
    """bitsandbytes' NormalFloat 4 with its scales quantised again: 4.127 bits a weight of the linear
    layers.

    Dettmers et al. 2023, arXiv 2305.14314, section 3. UserError without CUDA or bitsandbytes.
    """
    if device != "cuda":
        raise UserError(f"model.quantization nf4 needs a CUDA device, not {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization nf4 needs bitsandbytes: pip install 'exgrpo-fast[quant]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
