"""Versions and fingerprints of a run, and quiet libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch
import xxhash

from exgrpo_fast import __version__
from exgrpo_fast.config import Config, dump_yaml
from exgrpo_fast.core.allocator import keep_freed_memory
from exgrpo_fast.model.folder_reading import quiet_libraries


def prepare_process(device: str) -> None:
    """What a process that generates or trains wants of its libraries, before it loads a model."""
    quiet_libraries()
    if device == "cpu":
        keep_freed_memory()


def use_deterministic_algorithms() -> None:
    # cuBLAS is deterministic with workspaces of fixed sizes alone, read at its first call
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def config_digest(config: Config) -> str:
    return xxhash.xxh3_128_hexdigest(dump_yaml(config).encode())


def package_versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors", "numpy")
    versions = {"exgrpo-fast": __version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in names}
