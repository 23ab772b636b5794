"""The model up to its hidden states. Logits are never made here: the kernels take it from there.

It reads packs without padding; who sees whom in them is the concern of `attention/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM, PreTrainedModel

from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.transfer import to_device
from exgrpo_fast.model.attention.backends import BACKENDS, BackendName, Facts, choose, refusal
from exgrpo_fast.model.attention.interface import ATTENTION, PackedCall, ready_mask
from exgrpo_fast.model.folder_reading import PolicyError, read_generation_config
from exgrpo_fast.model.folder_settings import logit_scale, positions, refuse_unsupported
from exgrpo_fast.model.frozen import hold_linear_layers_in
from exgrpo_fast.model.head_gradient import summed_in_place
from exgrpo_fast.model.lora import merged_weights, trainable
from exgrpo_fast.model.oom import BatchLimits, retry_smaller_on_oom
from exgrpo_fast.model.packing import AssignedPack, Pack, Ragged, extent, pack, padded_ids
from exgrpo_fast.model.renamed import checkpointing_enable
from exgrpo_fast.model.tiling import decoder_layers, dense_mlp, run_in_tiles
from exgrpo_fast.model.weight_files import (
    read_shapes,
    refuse_dropped_weights,
    refuse_other_weights,
)
from exgrpo_kernels import linear_logprob, runtime

T = TypeVar("T")
# In training mode alone; the router_jitter_noise of phimoe is a threshold in both modes.
_ROUTER_NOISE = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}


class Head(NamedTuple):
    """The language-model head as the kernels take it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None


class Scores(NamedTuple):
    """Per-token figures of completions under the present weights, in the order they were given.

    float32 [N], joined end to end, on the policy's device.
    """

    logprobs: Tensor
    entropies: Tensor
    lengths: Tensor  # int64 [S], on the CPU

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """(log-probs [T], entropies [T]) of each completion, on the CPU."""
        lengths = self.lengths.tolist()
        logprobs, entropies = self.logprobs.cpu(), self.entropies.cpu()
        return list(zip(logprobs.split(lengths), entropies.split(lengths), strict=True))

    def pick(self, index: Tensor) -> Scores:
        """Those of some completions, by an index on the CPU."""
        logprobs, entropies = (
            Ragged(values, self.lengths).pick(index) for values in (self.logprobs, self.entropies)
        )
        return Scores(logprobs.values, entropies.values, entropies.lengths)

    def per_completion(self, values_N: Tensor, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """[N] -> [S], such as the mean entropy of each completion."""
        lengths = self.lengths.to(values_N.device, non_blocking=True)
        return torch.segment_reduce(values_N, reduce, lengths=lengths, unsafe=True)


class Policy:
    """A causal language model, its head taken apart from its body.

    `offload_activations`: what a forward pass saves waits in host memory for the backward pass.
    `tile_tokens`: MLPs, norms and logits are made of so many tokens at a time; 0: of the whole pack,
    the logits of as many as the kernels choose.
    `compute_dtype` bfloat16 runs the body under autocast, be the weights float32 or bfloat16.
    `attention`: the back end; PolicyError where it cannot run on this device or with this model.
    `dropout`: whether the update drops what the model's config says; adapters keep their own.
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
        tile_tokens: int = 0,
        temperature: float = 1.0,
        max_tokens_per_microbatch: int = 16384,
        dropout: bool = False,
    ) -> None:
        self.processes: Processes = SINGLE_PROCESS
        self.device = torch.device(device)
        self.model = model.to(self.device)  # pyright: ignore[reportArgumentType]
        self.compute_dtype = compute_dtype
        self.offload_activations = offload_activations
        self.tile_tokens = tile_tokens
        self.temperature = temperature
        self.sizes = BatchLimits(
            max_tokens_per_microbatch=max_tokens_per_microbatch, chunk_rows=tile_tokens or None
        )
        limit = positions(model.config.get_text_config())
        # Beyond it a pass fails, or one sequence of a pack changes what the others are.
        self.longest = limit.limit if limit and limit.binds else None
        self.dropout = dropout
        self.logit_scale = logit_scale(model.config)
        self.attention_calls = 0  # of the layers, in the last packed forward
        if not dropout:
            switch_off_dropout(model)
        refuse_unsupported(model.config)
        if model.get_output_embeddings() is None:
            raise PolicyError(f"{model.config.model_type}: the model has no language-model head")
        self.attention: BackendName = self._choose_attention(attention)
        chosen = str(model.config._attn_implementation)  # by transformers, unless it was a policy's
        self.own_attention = "eager" if chosen == ATTENTION else chosen
        model.set_attn_implementation(ATTENTION)
        if gradient_checkpointing:
            recompute_layers(model)
        if tile_tokens:
            if not all(map(dense_mlp, decoder_layers(model))):
                raise PolicyError(
                    f"model.tile_tokens: the layers of {model.config.model_type} have no dense MLP "
                    f"to run over tiles; set it to 0"
                )
            run_in_tiles(model, tile_tokens)
        model.train()

    def _choose_attention(self, asked: BackendName | Literal["auto"]) -> BackendName:
        facts: Facts = {
            "device": self.device,
            "dtype": self.compute_dtype,
            "model": self.model.config,
            "dropout": self.dropout and bool(getattr(self.model.config, "attention_dropout", 0.0)),
            "sinks": any(name.endswith(".sinks") for name, _ in self.model.named_parameters()),
        }
        name = choose(asked, **facts)
        refused = refusal(name, **facts)
        if refused is not None:
            raise PolicyError(f"model.attention {name} {refused}")
        return name

    @contextlib.contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Inside, the model has its own attention, as transformers loaded it."""
        self.model.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(ATTENTION)

    @property
    def head(self) -> Head:
        layer: Any = self.model.get_output_embeddings()
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(layer.weight, getattr(layer, "bias", None), softcap)

    @property
    def max_tokens_per_microbatch(self) -> int:
        """Tokens that one pass reads, as they fit: `sizes` holds them."""
        return self.sizes.max_tokens_per_microbatch

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def freeze(self) -> None:
        """Train nothing, from now on: a reference, a prior, a copy for generation."""
        self.model.requires_grad_(False)
        if self.compute_dtype != torch.float32:
            hold_linear_layers_in(self.model, self.compute_dtype)

    def assign_packs(self, packs: Sequence[Pack]) -> list[AssignedPack]:
        """Those of this process: all of them, where it is alone."""
        return [AssignedPack(pack, True) for pack in packs]

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Around passes with the same weights: what they share is made once."""
        return contextlib.nullcontext()

    def all_or_none(self, passes: Callable[[], T]) -> T:
        """`passes()`. `ShardedPolicy` overrides it: there all ranks have to agree."""
        return passes()

    def hidden_states(self, packed: Pack) -> Tensor:
        """Pack -> [N, D] in the compute dtype: one row for every completion token.

        A scale of the logits is in them: whoever takes their product with the head needs no other.
        """
        HEARTBEAT.beat()
        if self.longest and int(packed.layout.sequence_lengths.max()) > self.longest:
            raise PolicyError(
                f"{self.model.config.model_type}: a sequence of "
                f"{int(packed.layout.sequence_lengths.max()) + 1} tokens is longer than its "
                f"{self.longest} positions"
            )
        call = PackedCall(BACKENDS[self.attention](packed.layout, self.device))
        with self.autocast(), self._offloading():
            output = self.model.base_model(
                input_ids=packed.input_ids[None],
                position_ids=packed.position_ids[None],
                attention_mask=ready_mask(self.device),
                use_cache=False,
                packed=call,
            )
        self.attention_calls = call.num_calls
        hidden_ND = output.last_hidden_state[0].to(self.compute_dtype).index_select(0, packed.rows)
        return hidden_ND if self.logit_scale == 1.0 else hidden_ND * self.logit_scale

    def head_for(self, hidden_ND: Tensor) -> Head:
        """The head in the dtype of the hidden states (its float32 master keeps the gradient)."""
        weight, bias, softcap = self.head
        return Head(weight.to(hidden_ND.dtype), bias, softcap)

    def chunk_rows(self) -> int:
        """Rows of logits that are held at a time, of a whole micro-batch."""
        weight = self.head.weight
        row_bytes = len(weight) * self.compute_dtype.itemsize
        usual = runtime.chunk_rows(self.max_tokens_per_microbatch, row_bytes, weight.device)
        return min(usual, self.sizes.chunk_rows or usual)

    def head_gradient(self) -> contextlib.AbstractContextManager[Tensor | None]:
        """Around one loss: where it adds the gradient of the head's weight; None: by autograd."""
        return summed_in_place(self.head.weight)

    @torch.no_grad()
    def score(
        self,
        prompts: Ragged,
        completions: Ragged,
        *,
        kept: Ragged | None = None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> Scores:
        """Log-probs and entropies under the present weights: over the whole vocabulary, or over the
        set that each token was drawn from, `kept` (see `kept_sets`).

        `on_poll` is called once for each pack of sequences. OutOfMemory where not even one sequence
        fits.
        """
        return retry_smaller_on_oom(
            self,
            lambda: self._score(prompts, completions, on_poll, kept=kept),
            lambda: extent(prompts, completions),
            during="scoring",
        )

    @torch.no_grad()
    def score_in_training_mode(self, prompts: Ragged, completions: Ragged) -> Scores:
        """As `score`, with whatever training switches on, such as dropout: what the update sees."""
        return self._score(prompts, completions, lambda: None, training=True)

    def _score(
        self,
        prompts: Ragged,
        completions: Ragged,
        on_poll: Callable[[], None],
        *,
        training: bool = False,
        kept: Ragged | None = None,
    ) -> Scores:
        found = torch.zeros(2, len(completions.values), device=self.device)
        logprobs, entropies = found
        mode = contextlib.nullcontext() if training else inference(self.model)
        with mode, self.passes():
            limit = self.max_tokens_per_microbatch
            packs = pack(prompts, completions, max_tokens=limit, device=self.device)
            for packed, counts in self.assign_packs(packs):
                on_poll()
                hidden_ND = self.hidden_states(packed)
                if not counts:
                    continue
                weight, bias, softcap = self.head_for(hidden_ND)
                places = packed.places_in(completions)
                kept_ids = None
                if kept is not None:
                    (kept_ids,) = to_device([padded_ids(kept.pick(places))], self.device)
                out = linear_logprob(
                    hidden_ND,
                    weight,
                    packed.targets,
                    bias=bias,
                    temperature=self.temperature,
                    softcap=softcap,
                    kept_ids=kept_ids,
                    chunk_rows=self.sizes.chunk_rows,
                )
                del hidden_ND, weight  # the next pack needs the room
                (rows,) = to_device([places], self.device)
                logprobs[rows], entropies[rows] = out.logprobs, out.entropy
        self.processes.all_reduce_sum_(found)  # each is 0 in all processes but one
        return Scores(logprobs, entropies, completions.lengths)

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


def switch_off_dropout(model: nn.Module) -> None:
    """No dropout and no noise of routers in training mode; the model's config keeps its values.

    The ratio of an update to the log-probs of its rollouts is 1 at first only without them. Layers
    hold the probabilities as dropout modules or as float attributes with such a name. Those that
    `peft` has put in belong to the adapter, which is configured separately.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in attribute or attribute in _ROUTER_NOISE):
                setattr(module, attribute, 0.0)


def recompute_layers(model: Any) -> None:
    """Keep the input of each layer alone; in the backward pass the layer is made again.

    transformers lets the output of the embeddings require a gradient, for checkpoints of another
    kind. Behind frozen embeddings it would be a leaf, held with its gradient during the next pack.
    """
    checkpointing_enable(model)({"use_reentrant": False})
    model.disable_input_require_grads()


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
    read_shapes(name)
    generation = read_generation_config(name)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            **({"generation_config": generation} if generation else {}),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, in one line
            output_loading_info=True,
            **({"quantization_config": quantization} if quantization else {}),
        )
    except KeyError as error:  # a value of its config.json that transformers has no code for
        raise PolicyError(f"model.name {name}: config.json: transformers has no {error}") from None
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise PolicyError(f"model.name {name}: {first_line(error)}") from None
    model, loading = loaded
    refuse_other_weights(
        model.state_dict(),
        f"model.name {name}",
        mismatched=loading["mismatched_keys"],
        missing=loading["missing_keys"],
        unexpected=loading["unexpected_keys"],
    )
    refuse_dropped_weights(model.state_dict(), loading["unexpected_keys"], f"model.name {name}")
    return model
