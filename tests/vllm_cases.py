"""How the tests build a `VllmModel`, in this process or in a server, and change the weights."""

from __future__ import annotations

from typing import Any

import torch

from exgrpo_fast.model.policy import Policy

EOS = 1
ARGUMENTS: dict[str, Any] = {
    "eos_token_ids": [EOS],
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "kv_cache_bytes": 64 << 20,
    "top_k": 50,
}


def train_a_little(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
