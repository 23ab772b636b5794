"""The model up to its hidden states. Logits are never made here: the kernels take it from there.

It reads packs without padding; who sees whom in them is the concern of `attention/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from exgrpo_fast.attention.backends import BACKENDS, BackendName, choose, refusal
from exgrpo_fast.attention.interface import ATTENTION
from exgrpo_fast.errors import UserError
from exgrpo_fast.lora import merged_weights
from exgrpo_fast.packing import Pack, Ragged, pack
from exgrpo_kernels import linear_logprob

# A transformers tokenizer. Its annotations admit far more types than a tokenizer returns.
Tokenizer = Any


class PolicyError(UserError):
    """A model that this trainer cannot use, as one line to the user."""


class Head(NamedTuple):
    """The language-model head as the kernels take it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None


class Scores(NamedTuple):
    """Per-token figures of responses under the present weights, in the order they were given.

    float32 [N], joined end to end, on the policy's device.
    """

    logprobs: Tensor
    entropies: Tensor
    lengths: Tensor  # int64 [S], on the CPU

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """(log-probs [T], entropies [T]) of each response, on the CPU."""
        lengths = self.lengths.tolist()
        logprobs, entropies = self.logprobs.cpu(), self.entropies.cpu()
        return list(zip(logprobs.split(lengths), entropies.split(lengths), strict=True))

    def pick(self, index: Tensor) -> Scores:
        """Those of some responses, by an index on the CPU."""
        logprobs, entropies = (
            Ragged(values, self.lengths).pick(index) for values in (self.logprobs, self.entropies)
        )
        return Scores(logprobs.values, entropies.values, entropies.lengths)

    def per_response(self, values_N: Tensor, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """[N] -> [S], such as the mean entropy of each response."""
        lengths = self.lengths.to(values_N.device, non_blocking=True)
        return torch.segment_reduce(values_N, reduce, lengths=lengths, unsafe=True)


class Policy:
    """A causal language model, its head taken apart from its body.

    `offload_activations`: what a forward pass saves waits in host memory for the backward pass.
    `compute_dtype` bfloat16 runs the body under autocast, be the weights float32 or bfloat16.
    `attention`: the back end; PolicyError where it cannot run on this device or with this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        offload_activations: bool = False,
        attention: BackendName | Literal["auto"] = "auto",
        temperature: float = 1.0,
        max_tokens_per_microbatch: int = 16384,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)  # pyright: ignore[reportArgumentType]
        self.compute_dtype = compute_dtype
        self.offload_activations = offload_activations
        self.temperature = temperature
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        _check_supported(model)
        self.attention: BackendName = _attention(
            attention, self.device, compute_dtype, model.config
        )
        model.set_attn_implementation(ATTENTION)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    @property
    def head(self) -> Head:
        layer: Any = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return Head(layer.weight, getattr(layer, "bias", None), softcap)

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def hidden_states(self, packed: Pack) -> Tensor:
        """Pack -> [N, D] in the compute dtype: one row for every response token."""
        attention = BACKENDS[self.attention](packed.layout, self.device)
        with self.autocast(), self._offloading():
            output = self.model.base_model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                use_cache=False,
                packed=attention,
            )
        return output.last_hidden_state[0].to(self.compute_dtype).index_select(0, packed.rows)

    def head_for(self, hidden_ND: Tensor) -> Head:
        """The head in the dtype of the hidden states (its float32 master keeps the gradient)."""
        weight, bias, softcap = self.head
        return Head(weight.to(hidden_ND.dtype), bias, softcap)

    @torch.no_grad()
    def score(
        self, prompts: Ragged, responses: Ragged, *, waiting: Callable[[], None] = lambda: None
    ) -> Scores:
        """Log-probs and full-vocabulary entropies under the present weights.

        `waiting` is called once for each pack of sequences.
        """
        num_tokens = len(responses.values)
        logprobs, entropies = torch.empty(2, num_tokens, device=self.device)
        with inference(self.model):
            limit = 2 * self.max_tokens_per_microbatch  # no gradient: half the memory a token
            for packed in pack(prompts, responses, max_tokens=limit, device=self.device):
                waiting()
                hidden_ND = self.hidden_states(packed)
                weight, bias, softcap = self.head_for(hidden_ND)
                out = linear_logprob(
                    hidden_ND,
                    weight,
                    packed.targets,
                    bias=bias,
                    temperature=self.temperature,
                    softcap=softcap,
                )
                rows = packed.places_in(responses)
                logprobs[rows], entropies[rows] = out.logprobs, out.entropy
        return Scores(logprobs, entropies, responses.lengths)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, layer after layer, adapters merged in float32.

        A tied head is named as well: an engine that packs its weights would otherwise keep the
        head it was loaded with.
        """
        yield from merged_weights(self.model)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def _offloading(self) -> contextlib.AbstractContextManager[Any]:
        if not (self.offload_activations and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no checkpointing, caches allowed), put back on the way out."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, quantization: Any = None
) -> PreTrainedModel:
    """A local folder or hub name -> causal LM from safetensors; no remote code is run.

    `quantization`: a transformers quantisation config, such as `nf4`'s.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise PolicyError(f"model.name {name}: the folder holds no config.json")
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **({"quantization_config": quantization} if quantization else {}),
        )
    except (OSError, ValueError) as error:
        raise PolicyError(f"model.name {name}: {str(error).splitlines()[0]}") from None


def _attention(
    asked: BackendName | Literal["auto"], device: torch.device, dtype: torch.dtype, model: Any
) -> BackendName:
    name = choose(asked, device=device, dtype=dtype, model=model)
    refused = refusal(name, device=device, dtype=dtype, model=model)
    if refused is not None:
        raise PolicyError(f"model.attention {name} {refused}")
    return name


_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}  # others read past a sequence's end


def _check_supported(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "attn_logit_softcapping", None):
        raise PolicyError(f"{config.model_type}: soft-capped attention is not supported")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise PolicyError(f"{config.model_type}: scaled logits ({name}) are not supported")
    for kind in set(getattr(config, "layer_types", None) or ()) - _KINDS_OF_LAYERS:
        raise PolicyError(f"{config.model_type}: layers of {kind} are not supported")
    if model.get_output_embeddings() is None:
        raise PolicyError(f"{config.model_type}: the model has no language-model head")
