"""Frozen weights of 4 bits: what an engine and a checkpoint get of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.model.frozen import nf4
from exgrpo_fast.model.lora import add_adapter, merged_weights, save_plain
from exgrpo_fast.model.policy import load_model

IDS = torch.arange(3, 40)[None]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra `quant`"
)


def test_only_on_cuda() -> None:
    with pytest.raises(UserError, match="model.quantization nf4 needs a CUDA device, not cpu"):
        nf4(torch.float32, device="cpu")


@needs_bitsandbytes
def test_merged_weights_are_those_the_quantised_model_computes_with(
    model_folder: Path, tmp_path: Path
) -> None:
    """In training mode its CPU path multiplies float32 weights: only rounding is left."""
    nf4_float32 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load_model(str(model_folder), quantization=nf4_float32)
    add_adapter(model, rank=4, alpha=8.0, targets=["q_proj", "up_proj"])  # others: plain nf4
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    found = model.train()(IDS).logits
    save_plain(model, tmp_path / "hf")
    whole = load_model(str(model_folder)).eval()
    rounded = (whole(IDS).logits - found).abs().max()
    whole.load_state_dict(dict(merged_weights(model)))
    assert (whole(IDS).logits - found).abs().max() < 1e-4 < rounded
    assert (load_model(str(tmp_path / "hf")).eval()(IDS).logits - found).abs().max() < 1e-4
    assert "quantization_config" not in (tmp_path / "hf" / "config.json").read_text()
