"""The policy as a plain Hugging Face folder: what a checkpoint's hf/ holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from exgrpo_fast.policy import Policy, Tokenizer


class HuggingFaceFolder:
    """Weights in safetensors, config, tokenizer: loads anywhere."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer) -> None:
        self.policy = policy
        self.tokenizer = tokenizer

    def tensors(self) -> Mapping[str, Tensor]:
        return self.policy.model.state_dict()

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.policy.model.save_pretrained(folder, state_dict=dict(tensors))
        self.tokenizer.save_pretrained(folder)
