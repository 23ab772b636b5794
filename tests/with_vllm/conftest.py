"""Real vLLM models, all built before the first test: engines of one process live and end together.

Run by `make test-vllm`; without vLLM nothing here is collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_cases import ARGUMENTS, EOS

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # an environment of its own: `make test-vllm`
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads are slower than one
    # The first request compiles a C++ kernel otherwise.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Random policies: with an output head of their own (and another of this kind, for a prior),
    and with the embedding as their head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from exgrpo_fast.build.quickstart.toy_model import make_model

    base = tmp_path_factory.mktemp("policies")
    make_model(tokenizer, seed=0, layers=2, width=64).save_pretrained(base / "untied")
    tied = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=EOS,
    )
    Qwen2ForCausalLM(tied).save_pretrained(base / "tied")
    make_model(tokenizer, seed=1, layers=2, width=64).save_pretrained(base / "prior")
    for name in ("untied", "tied", "prior"):
        tokenizer.save_pretrained(base / name)
    return {name: base / name for name in ("untied", "tied", "prior")}


@pytest.fixture(scope="session")
def vllm_models(folders) -> Iterator[dict[str, Any]]:
    from exgrpo_fast.rollout.vllm.model import VllmModel

    models = {name: VllmModel(folder, **ARGUMENTS) for name, folder in folders.items()}
    yield models
    for model in models.values():
        model.close()
