"""Low-rank adapters on a frozen model, by peft: put in, switched off, merged, saved.

    W' = W + (alpha / rank) B A          A [rank, in], B [out, rank], B = 0 at the start

The adapters are injected into the model, whose class, head and names stay what they are. They are
float32 whatever the frozen weights are, and a model of bfloat16 weights runs under autocast; whoever
needs plain weights (an engine, a checkpoint) gets W' in float32 under its Hugging Face name. Formula: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exgrpo_fast.core.dtensor import full_tensor, replicated, shard_like
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # peft's format names weights from its own wrapper on


_NAMES_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"}


class LoraError(UserError):
    """An adapter that this model cannot take, as one line to the user."""


# --- putting them in ------------------------------------------------------------------------------


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all-linear",),
    seed: int = 0,
    name: str = "",
) -> None:
    """Freeze `model` and give its linear layers adapters, A drawn from `seed`.

    `targets`: names of layers, such as q_proj, or all-linear: all but the head. `name`: of the
    model, for the adapter's own config. LoraError where a target is missing or no linear layer.
    """
    peft = _import_peft()
    everything = tuple(targets) == ("all-linear",)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=_linear_layers(model) if everything else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    _check_targets(model, () if everything else targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            subject = f"model.lora.targets: {model.config.model_type}"
            raise LoraError(f"{subject}: {first_line(error)}") from None
    _check_adapted(model)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()  # bfloat16 would round the updates away
    for layer in _adapted_layers(model):
        # peft would make a float32 copy of each layer's input, which autocast makes bfloat16 again
        layer.cast_input_dtype_enabled = False


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the head.

    Of a mixture of experts those of its MLPs are left out: under these names peft would adapt the
    fused weights of all experts, which have no plain B A to be merged. So are a family's own
    subclasses that are no product alone, such as routers.
    """
    head = model.get_output_embeddings()
    is_mixture = any(parameter.dim() == 3 for parameter in model.parameters())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not (is_mixture and name.rpartition(".")[2] in _NAMES_OF_EXPERTS)
        and not (
            type(module).__module__.startswith("transformers.models")
            and type(module).forward is not nn.Linear.forward
        )
    ]


def _check_adapted(model: PreTrainedModel) -> None:
    """LoraError where peft has adapted what `merged_weights` cannot merge."""
    adapted: Any = {id(layer) for layer in _adapted_layers(model)}
    for name, module in model.named_modules():
        layer: Any = module
        if id(module) in adapted and not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            raise LoraError(
                f"model.lora.targets: peft takes {name} of {model.config.model_type} along, the "
                f"weights of several experts in one; name the layers of the attention, such as q_proj"
            )


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Each must name linear layers of the body, none the head: the kernels read that directly."""
    found: dict[str, list[nn.Module]] = {target: [] for target in targets}
    for name, module in model.named_modules():
        for target in targets:
            if name == target or name.endswith(f".{target}"):
                found[target].append(module)
    for target, modules in found.items():
        if any(module is model.get_output_embeddings() for module in modules):
            raise LoraError(
                f"model.lora.targets: {target} is the language-model head, which the fused loss "
                f"reads directly; leave it out"
            )
        if not modules:
            raise LoraError(f"model.lora.targets: {model.config.model_type} has no layer {target}")
        if not all(isinstance(module, (nn.Linear, Conv1D)) for module in modules):
            raise LoraError(f"model.lora.targets: {target} is not a linear layer")


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise LoraError("model.lora needs peft: pip install 'exgrpo-fast[train]'") from None
    return peft


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The frozen model alone, as it was before training."""
    layers, trained = _adapted_layers(model), trainable(model)
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:
        # peft freezes them, and FSDP2 would take its first pass for what trains no weight of a layer
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _adapted_layers(model: nn.Module) -> list[Any]:
    adapted = _import_peft().tuners.tuners_utils.BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, adapted)]


# --- plain weights --------------------------------------------------------------------------------


@torch.no_grad()
def merged_weights(model: nn.Module, *, tied: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its Hugging Face name, layer after layer; merged and dequantised ones float32.

    `tied`: a weight that stands under two names comes twice, as an engine that packs its weights
    needs it.
    """
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, weight in [*model.named_parameters(remove_duplicate=not tied), *buffers]:
        if ".lora_" in name:
            continue
        layer_name, _, leaf = name.rpartition(".")
        if layer_name.endswith(".base_layer"):
            layer: Any = model.get_submodule(layer_name.removesuffix(".base_layer"))
            if leaf == "weight":
                weight = merged_weight(layer)
        yield name.replace(".base_layer.", "."), plain(weight).detach()


def merged_weight(layer: Any) -> Tensor:
    """W' of one adapted layer in float32, laid out as W is."""
    return plain(layer.get_base_layer().weight).float() + _delta(layer)


def _delta(layer: Any) -> Tensor:
    """(alpha / rank) B A in float32; sharded: each rank has its rows of B and all of A.

    Transposed where the base layer keeps its weight as [in, out] (transformers' Conv1D).
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = layer.scaling["default"] * (b @ replicated(a))
    return delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta


@contextlib.contextmanager
def running_merged(model: nn.Module) -> Iterator[None]:
    """Inside, each adapted layer runs on its merged weight, made for the call: no copy is kept."""
    layers = _adapted_layers(model)
    for layer in layers:
        layer.forward = partial(_forward_merged, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_merged(layer: Any, x: Tensor) -> Tensor:
    base, weight = layer.get_base_layer(), merged_weight(layer)
    if plain(base.weight) is not base.weight:  # quantised: its own forward knows no plain weight
        return nn.functional.linear(x, weight.to(x.dtype), base.bias)
    return torch.func.functional_call(base, {"weight": weight.to(base.weight.dtype)}, (x,))


@contextlib.contextmanager
def random_adapter(model: nn.Module, *, seed: int = 0, share: float = 0.3) -> Iterator[None]:
    """Inside, B is random, such that the Frobenius norm of each update is `share` of that of W.

    At the start of a run B is 0, and no fault of the merge would be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = []
    with torch.no_grad():
        for layer in _adapted_layers(model):
            b = layer.lora_B["default"].weight
            kept.append((b, b.clone()))
            b.copy_(shard_like(torch.randn(b.shape, generator=generator), b))
            norm = full_tensor(plain(layer.get_base_layer().weight).float().norm())
            b.mul_(float(share * norm / full_tensor(_delta(layer).norm())))
    try:
        yield
    finally:
        with torch.no_grad():
            for b, before in kept:
                b.copy_(before)


def plain(weight: Tensor) -> Tensor:
    """A bitsandbytes weight of 4 bits as float32 of its own shape; any other as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports]
        dequantize_4bit,
    )

    exact = copy.copy(state)
    exact.dtype = torch.float32
    return dequantize_4bit(weight.data, exact)


def save_plain(
    model: PreTrainedModel, path: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """A Hugging Face folder that loads anywhere, without peft and without bitsandbytes.

    `weights`: copies of the merged ones, or None for those of this moment.
    """
    if not has_adapter(model):
        model.save_pretrained(path, state_dict=dict(weights) if weights else None)
        return
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        shell = type(model)(config)
    shell.generation_config = model.generation_config
    merged = dict(merged_weights(model, tied=False)) if weights is None else weights
    shell.save_pretrained(path, state_dict={name: w.cpu() for name, w in merged.items()})


# --- the adapter alone ----------------------------------------------------------------------------


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """By peft's own names; not copied."""
    return {
        f"{PEFT_PREFIX}{name.replace('.default', '')}": weight.detach()
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }


def save_adapter(
    model: PreTrainedModel, path: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """A folder in peft's own format: PeftModel.from_pretrained(base, path) takes it.

    `weights`: copies of the adapter's, or None for those of this moment.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config["default"])  # pyright: ignore[reportIndexIssue]
    config.inference_mode = True
    config.save_pretrained(str(path))
    weights = adapter_weights(model) if weights is None else weights
    saved = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(saved, path / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, path: Path) -> None:
    """Bit for bit what `save_adapter` wrote. LoraError where it is an adapter of another shape."""
    if not (path / WEIGHTS).exists():
        raise LoraError(f"--resume: {path.parent} holds no adapter, and model.lora is set")
    saved = load_file(path / WEIGHTS)
    ours = adapter_weights(model)
    described = json.loads((path / CONFIG).read_text())
    config: Any = model.peft_config["default"]  # pyright: ignore[reportIndexIssue]
    for key, what in (("r", "rank"), ("lora_alpha", "alpha")):
        if described[key] != getattr(config, key):
            raise LoraError(
                f"model.lora.{what}: the checkpoint's adapter has {described[key]}, the config "
                f"{getattr(config, key)}"
            )
    if saved.keys() != ours.keys():
        raise LoraError(f"model.lora.targets: other layers than those of the adapter in {path}")
    with torch.no_grad():
        for name, weight in ours.items():
            weight.copy_(saved[name])
