"""Frozen weights in 4 bits (QLoRA), by bitsandbytes through transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from exgrpo_fast.core.errors import UserError


def nf4(compute_dtype: torch.dtype, *, device: str) -> Any:
    """NormalFloat 4 with its scales quantised again: 4.127 bits a weight of the linear layers.

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
