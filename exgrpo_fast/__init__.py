"""exgrpo-fast: reinforcement learning with verifiable rewards on one GPU.

The names below are loaded on first use, so that `import exgrpo_fast` and every message about a
user's mistake come before torch is imported.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "train": "exgrpo_fast.api.training",
    "evaluate": "exgrpo_fast.api.evaluation",
    "watch": "exgrpo_fast.api.watching",
    "Config": "exgrpo_fast.config",
    "load_config": "exgrpo_fast.config",
    "Question": "exgrpo_fast.core.types",
    "Trajectory": "exgrpo_fast.core.types",
    "Group": "exgrpo_fast.core.types",
    "TokenColumns": "exgrpo_fast.core.types",
    "Trainer": "exgrpo_fast.training.trainer",
    "RewardPool": "exgrpo_fast.rewards",
    "load_questions": "exgrpo_fast.data",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'exgrpo_fast' has no attribute '{name}'")
