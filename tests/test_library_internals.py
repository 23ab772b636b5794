"""Where the code relies on more of a library than its documentation promises.

One test for each place, so that a new release which moves one fails here by name and not in a run.
vLLM's are exercised in tests/with_vllm, all in rollout/vllm/model.py; datasets and TRL are used by
their documented interfaces alone.
"""

from __future__ import annotations

import importlib
import inspect
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from exgrpo_fast.model.folder_settings import ENCODERS, causal_types
from exgrpo_fast.model.renamed import cache_argument, checkpointing_enable
from exgrpo_kernels.policy_loss import keeps_graph

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
SMALL = Qwen3Config(**SHAPE)


def test_rollout_decoding_extends_a_cache_layer() -> None:
    """PreallocatedLayer: `keys` and `values` are what get_seq_length and get_mask_sizes read."""
    layer, new = DynamicLayer(), torch.ones(2, 1, 3, 4)
    layer.update(new, new)
    assert layer.is_initialized and layer.keys is not None and layer.values is not None
    assert layer.keys.shape == layer.values.shape == new.shape
    layer.keys = layer.keys[..., :2, :]
    assert layer.get_seq_length() == 2
    assert "key_states" in inspect.signature(DynamicLayer.lazy_initialization).parameters


def test_rollout_decoding_replaces_the_layers_of_a_cache() -> None:
    layers = DynamicCache(config=SMALL).layers
    assert [type(layer) for layer in layers] == [DynamicLayer] * 2


def test_prior_selects_rows_of_a_cache() -> None:
    """MaskedCache.select."""
    cache: Any = DynamicCache(config=SMALL)
    keys = torch.arange(3.0).view(3, 1, 1, 1)
    cache.update(keys, keys, 0)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.flatten().tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        (AttentionInterface, ["module", "query", "key", "value", "attention_mask"]),
        (AttentionMaskInterface, ["attention_mask"]),
    ],
)
def test_attention_interface_calls_the_registered_sdpa(registry, expected) -> None:
    parameters = inspect.signature(registry()["sdpa"]).parameters
    assert set(expected) <= set(parameters)


def test_attention_receives_what_the_packed_forward_is_given() -> None:
    """model/policy.py hands `packed` to the model; the layers pass it on to the attention."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs["packed"])
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    AttentionInterface.register("seen_by_a_test", attention)
    AttentionMaskInterface.register("seen_by_a_test", lambda *args, **kwargs: None)
    model = Qwen3ForCausalLM(SMALL)
    model.set_attn_implementation("seen_by_a_test")
    model.model(input_ids=torch.tensor([[1, 2]]), packed="layout")
    assert seen == ["layout"] * 2


def test_policy_recomputes_layers() -> None:
    """recompute_layers: enabled with use_reentrant=False, the embeddings' hook taken off again."""
    model = Qwen3ForCausalLM(SMALL)
    checkpointing_enable(model)({"use_reentrant": False})
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(torch.tensor([1])).detach().requires_grad
    assert isinstance(model, PreTrainedModel)


def test_renamed_arguments_are_called_by_their_newest_names(recwarn: Any) -> None:
    """model/renamed.py: `cache` and `activation_checkpointing_enable` since 5.24."""
    model = Qwen3ForCausalLM(SMALL)
    model.set_attn_implementation("sdpa")  # the config is shared with other tests
    is_new = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    assert cache_argument(model) == ("cache" if is_new else "past_key_values")
    cache = DynamicCache(config=SMALL)
    model(torch.tensor([[1, 2, 3]]), use_cache=True, **{cache_argument(model): cache})
    assert cache.get_seq_length() == 3
    checkpointing_enable(model)({"use_reentrant": False})
    assert not [w for w in recwarn if "deprecated" in str(w.message)]


def test_lora_reads_pefts_layers() -> None:
    """model/lora.py: the class of an adapted layer, its parts, its switch and its cast."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = Qwen3ForCausalLM(SMALL)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]), model)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) == 2 and hasattr(model, "peft_config")
    for layer in layers:
        assert layer.scaling["default"] == 1.5
        assert layer.lora_A["default"].weight.shape == (2, 16)
        assert layer.lora_B["default"].weight.shape == (16, 2)
        assert isinstance(layer.cast_input_dtype_enabled, bool)
        assert layer.get_base_layer().weight.shape == (16, 16)
        layer.enable_adapters(False)
        assert layer.disable_adapters


def test_policy_loss_sees_whether_a_graph_is_kept() -> None:
    """WithGradients multiplies its gradients in place where nothing needs them again."""
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
            seen.append(keeps_graph())
            return upstream

    leaf = torch.ones((), requires_grad=True)
    loss: Any = Asks.apply(leaf)
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    loss.backward()
    assert seen == [True, True, False]


def test_a_sharded_pass_is_checked_before_each_collective() -> None:
    """PassCheck.guard derives from the two, whose `allocate` comes before the call."""
    module = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
    collectives = importlib.import_module(module)
    for name in ("DefaultAllGather", "DefaultReduceScatter"):
        kind = getattr(collectives, name)
        assert {"allocate", "__call__"} <= set(dir(kind)), name
        assert kind().allocate((3,), dtype=torch.float32, device=torch.device("cpu")).shape == (3,)


def test_fsdp_calls_the_hooks_of_a_sharded_parameter_and_goes_back_twice() -> None:
    """gradient_release: with the shard of each gradient, in both passes over one graph. sharded_policy.py: a
    module knows whether a pass has begun."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        module: Any = fully_shard(torch.nn.Linear(2, 3))
        assert module._get_fsdp_state()._is_root is None
        seen: list[torch.Tensor] = []
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.to_local()))
        loss = module(torch.ones(1, 2)).sum()
        assert module._get_fsdp_state()._is_root
        loss.backward(retain_graph=True)
        loss.backward()
        assert [tuple(gradient.shape) for gradient in seen] == 2 * [(3, 2), (3,)]
    finally:
        dist.destroy_process_group()


def test_rollout_multiplies_by_weights_in_onednns_layout() -> None:
    """packed_weights, packed_decoder: the operators that torch.compile uses for linear layers on a CPU."""
    weight, rows = torch.randn(5, 3), torch.randn(2, 7, 3)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    product = torch.ops.mkldnn._linear_pointwise
    plain, other = rows @ weight.T, torch.randn(2, 7, 5)
    torch.testing.assert_close(product(rows, packed, None, "none", [], ""), plain)
    torch.testing.assert_close(product(rows, packed, None, "swish", [], ""), F.silu(plain))
    torch.testing.assert_close(product.binary(rows, other, packed, None, "add"), plain + other)
    torch.testing.assert_close(product.binary(rows, other, packed, None, "mul"), plain * other)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_packed_decoder_knows_the_parts_of_a_decoder(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert {name for name, _ in model.model.named_children()} == {
        "embed_tokens",
        "layers",
        "norm",
        "rotary_emb",
    }
    layer = model.model.layers[0]
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert {name for name, _ in layer.named_children()} == {"self_attn", "mlp", *norms}
    of_attention = {name for name, _ in layer.self_attn.named_children()}
    of_heads = {"q_norm", "k_norm"} if family == "Qwen3" else set()
    assert of_attention == {"q_proj", "k_proj", "v_proj", "o_proj", *of_heads}
    assert layer.self_attn.scaling == layer.self_attn.head_dim**-0.5
    assert model.model.norm.variance_epsilon == config.rms_norm_eps


def test_broadcast_sets_the_device_and_time_limit_of_a_gloo_group() -> None:
    """weight_transfer.make_group: the options of gloo, and the device that names its address."""
    options: Any = torch.distributed.ProcessGroupGloo._Options()  # type: ignore
    device = torch.distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    options._devices, options._timeout = [device], timedelta(seconds=3)
    assert len(options._devices) == 1 and options._timeout == timedelta(seconds=3)


def test_gguf_architectures_are_listed_without_torch() -> None:
    """model/gguf_file.py reads the list that transformers' own reader goes by."""
    assert set(GGUF_CONFIG_MAPPING) == set(GGUF_SUPPORTED_ARCHITECTURES)
    assert {"general", "llama", "qwen2_moe"} <= set(GGUF_CONFIG_MAPPING)


def test_the_source_of_transformers_names_the_causal_models() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert ENCODERS <= causal_types()
