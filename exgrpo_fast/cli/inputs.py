"""What can be known of a command's inputs before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from exgrpo_fast.config import Config, ConfigError


def check_inputs(config: Config) -> None:
    """Missing values and files, before torch is imported."""
    if config.model.name is None:
        raise ConfigError("model.name is not set: give a local folder or a hub name")
    if config.data.train is None:
        raise ConfigError("data.train is not set: give a .jsonl file, a dataset or a gym task")
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if isinstance(source, str) and Path(source).suffix in {".jsonl", ".json", ".parquet"}:
            require_file(source, key)
    if looks_local(config.model.name):
        require_file(config.model.name, "model.name")
    if config.prior_resampling.enabled and config.prior_resampling.model is not None:
        require_file(f"{config.prior_resampling.model}/config.json", "prior_resampling.model")
    require_rewards(config.reward.functions, "reward.functions")


def looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def require_file(path: str, key: str) -> None:
    if Path(path).exists():
        return
    folder = Path(path).parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, names, n=1)
    hint = f"; did you mean {folder / close[0]}?" if close else ""
    raise ConfigError(f"{key}: {path} does not exist{hint}")


def require_absent(out: str) -> None:
    if Path(out).exists():
        raise ConfigError(f"--out {out}: is there already")


def require_rewards(references: Sequence[str], key: str) -> None:
    from exgrpo_fast.rewards import RewardError, check_reference

    for reference in references:
        try:
            check_reference(reference)
        except RewardError as error:
            raise ConfigError(f"{key}: {error}") from None


def choose_device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device (exgrpo-fast doctor says more)")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
