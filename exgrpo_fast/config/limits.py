"""Limits of a config that depend on the world size or on what is installed."""

from __future__ import annotations

import importlib.util

from exgrpo_fast.config.schema import Config
from exgrpo_fast.config.sections import ConfigError


def refuse_with_several(config: Config, count: int) -> None:
    """ConfigError naming the first key that `count` processes cannot honour."""
    if count == 1:
        return
    refuse_engine_with_several(config, config.rollout.engine, count)
    algorithm, rollout = config.algorithm, config.rollout
    refused = {
        "model.quantization": config.model.quantization is not None,
        "model.lora.dropout": config.model.lora is not None and config.model.lora.dropout > 0,
        f"train.optimizer {config.optimizer}": config.optimizer != "adamw",
        "rollout.generate_ahead": rollout.generate_ahead,
        "train.gradient_release": config.train.gradient_release,
        "prior_resampling.enabled": config.prior_resampling.enabled,
        "algorithm.kl.previous_share": algorithm.kl.previous_share > 0,
        "algorithm.kl.rebase_at_step": algorithm.kl.rebase_at_step is not None,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"{name} does not go with {count} processes; one process can do it")


def refuse_engine_with_several(config: Config, kind: str, count: int) -> None:
    """`kind`: the resolved `rollout.engine`."""
    if kind == "vllm" and count > 1:
        raise ConfigError(
            f"rollout.engine {config.rollout.engine}: vLLM in the trainer's process does not go "
            f"with {count} processes; vllm_server or transformers does"
        )


def engine_kind(config: Config, device: str) -> str:
    """`rollout.engine` with `auto` resolved. ConfigError where vLLM is asked for and absent."""
    kind, installed = config.rollout.engine, importlib.util.find_spec("vllm") is not None
    if kind == "auto":
        return "vllm" if installed and device == "cuda" else "transformers"
    if kind == "vllm" and not installed:
        raise ConfigError("rollout.engine vllm: vLLM is not installed; `exgrpo-fast doctor`")
    if kind == "vllm_server" and not installed and not config.rollout.server.urls:
        raise ConfigError("rollout.engine vllm_server: vLLM is not installed; `exgrpo-fast doctor`")
    return kind
