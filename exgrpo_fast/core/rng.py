"""The process-wide random states, as JSON and tensors: user code may draw from them.

Everything of this package draws from generators and seeds of its own.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)  # the GPUs' generators, too


@contextlib.contextmanager
def seeded_by(*numbers: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators of the CPU and of `device` start from a hash of `numbers`; outside
    they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(xxhash.xxh3_64_intdigest(repr(numbers).encode()))
        yield


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch; the words of the two Mersenne twisters as tensors."""
    version, words, gauss = random.getstate()
    twister: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = twister
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())},
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Take up a saved state; that of a GPU which is not here is left aside."""
    python, twister = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = twister["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (twister["name"], keys, twister["position"], twister["has_gauss"], twister["gauss"])
    )
    torch.set_rng_state(state["torch"])
    for index, saved in state["cuda"].items():
        if int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(saved, int(index))
