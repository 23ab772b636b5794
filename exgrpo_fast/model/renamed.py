"""What transformers has renamed between the oldest and the newest release that are supported.

The old names still work in 5.24 and warn; they are to go in version 6.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def cache_argument(model: Any) -> str:
    """What `forward` calls the keys and values it goes on from: `cache`, `past_key_values` before
    5.24."""
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"


def checkpointing_enable(model: Any) -> Callable[..., None]:
    """`activation_checkpointing_enable`, `gradient_checkpointing_enable` before 5.24."""
    newest = getattr(model, "activation_checkpointing_enable", None)
    return model.gradient_checkpointing_enable if newest is None else newest
