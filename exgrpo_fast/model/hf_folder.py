"""The policy as the files of a checkpoint: a plain Hugging Face folder, and its adapter beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.model.lora import (
    PEFT_PREFIX,
    adapter_weights,
    has_adapter,
    merged_weights,
    save_adapter,
    save_plain,
)
from exgrpo_fast.model.policy import Policy


class HuggingFaceFolder:
    """Weights in safetensors, config, tokenizer: loads anywhere. An adapter is merged into it."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer) -> None:
        self.policy = policy
        self.tokenizer = tokenizer

    def tensors(self) -> Mapping[str, Tensor]:
        model = self.policy.model
        if not has_adapter(model):
            return model.state_dict()
        return {**dict(merged_weights(model, tied=False)), **adapter_weights(model)}

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """`folder`: the checkpoint's hf/; an adapter is written beside it."""
        model = self.policy.model
        adapter = {n: weight for n, weight in tensors.items() if n.startswith(PEFT_PREFIX)}
        save_plain(model, folder, {n: w for n, w in tensors.items() if n not in adapter})
        self.tokenizer.save_pretrained(folder)
        if adapter:
            save_adapter(model, folder.with_name("adapter"), adapter)
