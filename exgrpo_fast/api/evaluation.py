"""`evaluate(...)`: avg@n and pass@k of a model from Python."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.api.inputs import Reward, Rows, as_references, as_source, make_config
from exgrpo_fast.cli.arguments import data_files, require_file, require_rewards
from exgrpo_fast.cli.eval import open_model
from exgrpo_fast.config import Config, require
from exgrpo_fast.rewards.loading import stop_where_imported


def evaluate(
    model: str,
    data: Rows,
    reward: Reward | Sequence[Reward] = "math_verify",
    *,
    n: int = 8,
    k: int | Sequence[int] = (1,),
    device: str | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """avg@n with its 95 % bootstrap interval, unbiased pass@k and truncation, as `eval` prints.

    model, data, reward and keys are those of `train`.
    Errors: UserError in one line, before weights are loaded.
    """
    stop_where_imported()
    with tempfile.TemporaryDirectory() as folder:
        source = as_source(data, Path(folder) / "eval.jsonl")
        values = {
            "model.name": str(model),
            "reward.functions": as_references(reward, Path(folder)),
            "eval.n": n,
            "eval.k": [k] if isinstance(k, int) else list(k),
            "data.eval": source,
        }
        config = make_config(Config(), values | keys)
        require(config.model.name, "model.name", "a folder or a hub name")
        for key, file in data_files(config).items():
            require_file(file, key)
        require_rewards(config.reward.functions, "reward.functions")
        files = list(data_files(config).values())
        evaluated = open_model(config, files, key="model.name", device=device)
        with evaluated.rewards or contextlib.nullcontext():
            questions = evaluated.read(source)
            with evaluated.evaluator(questions[0]) as evaluator:
                return evaluator(questions).as_dict()
