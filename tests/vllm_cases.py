"""How the tests build a `VllmModel`, in this process or in a server."""

from __future__ import annotations

from typing import Any

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
