"""Which engine a config gets, what it may take of the device, and what happens when it is too much."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_config
from transformers import GenerationConfig

import exgrpo_fast.build.engines as engines
from exgrpo_fast.build import servers
from exgrpo_fast.build.experience import make_prior
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.config import Config, ConfigError, engine_kind, schema
from exgrpo_fast.experience.prior.hf_backend import TransformersDrafter
from exgrpo_fast.experience.prior.source import PriorSource
from exgrpo_fast.experience.prior.vllm_backend import VllmDrafter, VllmPrior
from exgrpo_fast.memory.budgets import engine_plan, kv_bytes_per_token, max_model_len
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.mismatch import NO_CORRECTION
from exgrpo_fast.rollout.vllm.engine import VllmEngine

# Qwen2.5-7B's shapes
LARGE = SimpleNamespace(
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    hidden_size=3584,
    max_position_embeddings=32768,
)
GIB = 2**30


def config_of(**rollout: Any) -> Config:
    sections = {"rollout": rollout, "train": {"max_tokens_per_microbatch": 4096}}
    return small_config(Path("nowhere"), "right", sections)


@pytest.fixture
def vllm_installed(monkeypatch) -> None:
    monkeypatch.setattr(schema.importlib.util, "find_spec", lambda name: object())


def test_auto_is_vllm_on_cuda_where_it_is_installed(vllm_installed) -> None:
    assert engine_kind(config_of(), "cuda") == "vllm"
    assert engine_kind(config_of(), "cpu") == "transformers"
    assert engine_kind(config_of(engine="vllm"), "cpu") == "vllm"
    assert engine_kind(config_of(engine="transformers"), "cuda") == "transformers"


def test_without_vllm_auto_still_trains_and_a_wish_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(schema.importlib.util, "find_spec", lambda name: None)
    assert engine_kind(config_of(), "cuda") == "transformers"
    for engine in ("vllm", "vllm_server"):
        with pytest.raises(ConfigError, match=f"rollout.engine {engine}: vLLM is not installed"):
            engine_kind(config_of(engine=engine), "cuda")
    elsewhere = config_of(engine="vllm_server", server={"urls": ["http://there:1"]})
    assert engine_kind(elsewhere, "cuda") == "vllm_server"


def test_only_other_weights_are_corrected(vllm_installed) -> None:
    assert engines.mismatch_rule(config_of(), "cpu") == NO_CORRECTION
    rule = engines.mismatch_rule(config_of(engine="vllm"), "cpu")
    assert (rule.correction, rule.max_ratio, rule.min_ratio) == ("token_truncate", 2.0, 0.0)


def plan(config: Config, gib: float, *, shared: bool = True, device: str = "cuda"):
    return engine_plan(
        config,
        LARGE,
        num_parameters=7_600_000_000,
        dtype="bfloat16",
        device=device,
        device_bytes=int(gib * GIB),
        trainer_bytes=shared * 16 * 7_600_000_000,
        resident_bytes=shared * 12 * 7_600_000_000,
    )


def test_bytes_of_a_cached_token() -> None:
    assert kv_bytes_per_token(LARGE, dtype="bfloat16") == 2 * 28 * 4 * 128 * 2 == 57344


def test_the_longest_sequence_counts_the_hindsight_prompt_and_the_models_limit() -> None:
    config = config_of(max_completion_tokens=100)
    assert max_model_len(config, 32768) == 32 + 100
    assert max_model_len(config, 64) == 64
    sections = {
        "hindsight": {"enabled": True, "max_prompt_tokens": 300},
        "train": {"max_tokens_per_microbatch": 512},
        "rollout": {"max_completion_tokens": 100},
    }
    assert max_model_len(small_config(Path("nowhere"), "right", sections), 32768) == 400


def test_a_large_card_keeps_the_engine_awake_and_a_small_one_does_not() -> None:
    config = config_of(max_completion_tokens=2016, max_batch_sequences=256)
    wanted = 257 * 2048 * 57344  # sequences x tokens, whole blocks of 16 x bytes
    roomy = plan(config, 250)
    assert (roomy.sleeps, roomy.kv_cache_bytes) == (False, wanted)
    tight = plan(config, 141)
    # asleep: 90 % of the card without 2 bytes of weights and 12 of the trainer's a parameter
    assert tight.sleeps
    assert tight.kv_cache_bytes == int(0.9 * 141 * GIB) - 14 * 7_600_000_000
    alone = plan(config, 80, shared=False)
    assert (alone.sleeps, alone.kv_cache_bytes) == (False, wanted)


def test_sleep_can_be_decided() -> None:
    config = config_of(max_completion_tokens=2016, sleep="always")
    assert plan(config, 250).sleeps
    assert not plan(config_of(max_completion_tokens=2016, sleep="never"), 160).sleeps


def test_what_does_not_hold_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.kv_cache_gib: 0.00 GiB are left .* 0.11"):
        plan(config_of(max_completion_tokens=2016), 80)
    with pytest.raises(ConfigError, match="rollout.kv_cache_gib: 0.05 GiB"):
        plan(config_of(max_completion_tokens=2016, kv_cache_gib=0.05), 250)


def test_on_a_cpu_the_cache_is_small_and_in_its_own_blocks() -> None:
    found = plan(config_of(max_batch_sequences=2), 0, device="cpu")
    assert found.kv_cache_bytes == 3 * 128 * 57344 and not found.sleeps


def test_out_of_memory_halves_once_and_then_says_what_to_do() -> None:
    model = {"kv_cache_bytes": 8 * GIB, "max_num_seqs": 64}
    seen: list[dict[str, Any]] = []

    def make(changes: dict[str, Any]) -> str:
        seen.append(changes)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("full")
        return "made"

    assert engines.with_less_memory_once(make, model) == "made"
    assert seen == [{}, {"kv_cache_bytes": 4 * GIB, "max_num_seqs": 32}]

    def never(changes: dict[str, Any]) -> str:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(
        ConfigError, match="rollout.kv_cache_gib: vLLM runs out of memory with 8.00"
    ):
        engines.with_less_memory_once(never, model)


def test_servers_take_the_gpus_behind_the_trainers(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    config = config_of(engine="vllm_server", server={"count": 2})
    assert [servers.server_gpu(config, i) for i in range(2)] == [1, 2]
    with pytest.raises(ConfigError, match="no GPU for server 2; this machine has 3"):
        servers.server_gpu(config, 2)
    chosen = config_of(engine="vllm_server", server={"gpus": [2, 0]})
    assert [servers.server_gpu(chosen, i) for i in range(2)] == [2, 0]


def test_ends_are_the_tokenizers_first_and_each_once() -> None:
    tokenizer = SimpleNamespace(eos_token_id=5)
    assert engines.end_of_sequence_ids(None, tokenizer) == [5]
    assert engines.end_of_sequence_ids(GenerationConfig(eos_token_id=[7, 5]), tokenizer) == [5, 7]


def test_generation_ahead_needs_an_engine_elsewhere() -> None:
    with pytest.raises(
        ConfigError, match="rollout.generate_ahead needs rollout.engine vllm_server"
    ):
        config_of(generate_ahead=True)


# --- reserved before the policy, built after it ---------------------------------------------------


class FakeVllm:
    """Stands in for a `VllmModel`: what was asked for, and whether it was closed."""

    cache_block_tokens = 16

    def __init__(self, folder: str, **arguments: Any) -> None:
        self.folder, self.arguments, self.closed = folder, arguments, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def guided(model_folder: Path, vllm_installed, monkeypatch) -> Config:
    monkeypatch.setattr(engines, "VllmModel", FakeVllm)
    prior = {"enabled": True, "model": str(model_folder)}
    sections = {"rollout": {"engine": "vllm"}, "prior_resampling": prior}
    return small_config(model_folder, "right", sections)


def test_eapo_drafts_and_scores_in_the_vllm_of_the_run(guided, model_folder, tokenizer) -> None:
    with engines.reserve_engine(guided, str(model_folder), tokenizer, device="cpu") as reserved:
        policy = make_policy(guided, str(model_folder), device="cpu")
        engine = engines.build_engine(guided, policy, tokenizer, reserved, prompt_ids=(5, 6))
        source = make_prior(guided, policy, tokenizer, engine, reserved.vllm_prior)
        models: Any = [reserved.vllm, reserved.vllm_prior]
    assert isinstance(source, PriorSource)
    drafter, scorer = source.resampler.drafter, source.resampler.scorer
    assert isinstance(drafter, VllmDrafter) and isinstance(scorer, VllmPrior)
    assert drafter.engine is engines.find_layer(engine, VllmEngine)
    assert [drafter.engine.model, scorer.model] == models
    lengths = [model.arguments["max_model_len"] for model in models]
    assert lengths == [32 + 12, 32 + 12 + 1] and all(model.closed for model in models)


def test_a_prior_in_vllm_never_falls_back_to_transformers(guided, model_folder, tokenizer) -> None:
    policy = make_policy(guided, str(model_folder), device="cpu")
    other = engines.make_transformers_engine(guided, policy, tokenizer)
    with pytest.raises(TypeError, match="needs an engine in vLLM"):
        make_prior(guided, policy, tokenizer, other, FakeVllm("prior"))  # pyright: ignore


def test_without_vllm_nothing_is_reserved_and_the_policy_itself_drafts(
    model_folder, tokenizer
) -> None:
    prior = {"enabled": True, "model": str(model_folder)}
    config = small_config(model_folder, "right", {"prior_resampling": prior})
    with engines.reserve_engine(config, str(model_folder), tokenizer, device="cpu") as reserved:
        policy = make_policy(config, str(model_folder), device="cpu")
        engine = engines.build_engine(config, policy, tokenizer, reserved, prompt_ids=(5, 6))
    assert (reserved.plan, reserved.vllm, reserved.vllm_prior) == (None, None, None)
    assert isinstance(engine, TransformersEngine) and engine.policy is policy
    source = make_prior(config, policy, tokenizer, engine, reserved.vllm_prior)
    assert isinstance(source, PriorSource)
    assert isinstance(source.resampler.drafter, TransformersDrafter)


def test_servers_of_several_processes_need_gpus_of_their_own(vllm_installed) -> None:
    config = config_of(engine="vllm_server")
    engines.refuse_unplaced_engine(config, "cpu", 2)
    with pytest.raises(ConfigError, match="rollout.server.gpus is not set: with 2 processes"):
        engines.refuse_unplaced_engine(config, "cuda", 2)
    placed = config_of(engine="vllm_server", server={"gpus": [2]})
    engines.refuse_unplaced_engine(placed, "cuda", 2)
