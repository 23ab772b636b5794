"""What a model holds during its passes, from its shapes alone.

The model's own code runs over fake tensors: they have shapes and no memory, and a ledger adds up
what real ones would take. Three and four layers are enough: from there on everything grows linearly
with their number. Of two, the first needs no gradient of its input under an adapter, and is less.

Attention is one packed sequence through torch's fused kernels, which keep no [T, T]. No pack whose
prompts are shared holds more.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from exgrpo_fast.model.attention.layout import Scoring
from exgrpo_fast.model.attention.sdpa import SideBySideBlock, attend
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.policy import recompute_layers
from exgrpo_fast.model.tiling import decoder_layers, dense_mlp, run_in_tiles

ATTENTION = "exgrpo_memory_plan"
LAYERS = (3, 4)  # of the two small traces


@dataclass(frozen=True)
class Passes:
    """Bytes beside weights and gradients; counts of parameters."""

    forward: float  # peak of the forward pass
    saved: float  # after it: checkpoints, or all activations, and the hidden states
    backward_top: float  # peak of the backward pass as far as through the last layer
    backward_rest: float  # and from there on
    scoring: float  # peak of a forward pass without gradients
    frozen: float  # parameters
    trained: float
    quantisable: float  # weights of the linear layers, the head aside

    @property
    def backward(self) -> float:
        return max(self.backward_top, self.backward_rest)


@dataclass(frozen=True)
class Setting:
    """What changes what a pass holds. `lora`: arguments of `add_adapter`."""

    weights: torch.dtype
    compute: torch.dtype
    checkpointing: bool
    lora: dict[str, Any] | None = None
    tile_tokens: int = 0  # 0: the whole pack at once
    gradient_release: bool = False  # the graph outlives the backward pass


class Tracer:
    """Passes of one model at any number of tokens; `model` is its transformers config."""

    def __init__(self, model: Any, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self.known: dict[int, Passes] = {}

    @cached_property
    def can_tile(self) -> bool:
        """Whether the layers have MLPs that can run over tiles."""
        return all(map(dense_mlp, decoder_layers(_first_layers(self.model, self.setting, 1))))

    def __call__(self, tokens: int) -> Passes:
        if tokens not in self.known:
            few, more = (
                trace(self.model, self.setting, layers=layers, tokens=tokens) for layers in LAYERS
            )
            self.known[tokens] = _extrapolate(few, more, self.model.num_hidden_layers)
        return self.known[tokens]


def _extrapolate(few: Passes, more: Passes, layers: int) -> Passes:
    """a + b L through both."""
    low, high = LAYERS
    values = {}
    for name in (field.name for field in fields(Passes)):
        slope = (getattr(more, name) - getattr(few, name)) / (high - low)
        values[name] = getattr(few, name) + slope * (layers - low)
    return Passes(**values)


def trace(model: Any, setting: Setting, *, layers: int, tokens: int) -> Passes:
    """One pass forward and backward, and one without gradients, of the first `layers` layers."""
    made = _first_layers(model, setting, layers)
    with FakeTensorMode():
        _make_fake(made)
        parameters = list(made.parameters())
        trained = [p for p in parameters if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        ledger = Ledger([*parameters, *made.buffers(), *(p.grad for p in trained)])
        tops: list[int] = []
        with ledger, _after_last_layer(made, lambda: tops.append(ledger.take_peak())):
            hidden = _hidden_states(made, setting, tokens)
            forward, saved = ledger.take_peak(), ledger.live
            loss = _Loss.apply(hidden)
            del hidden
            loss.backward(retain_graph=setting.gradient_release)
            rest = ledger.take_peak()
            del loss  # and the graph, where it is still there
            ledger.take_peak()
            made.eval()
            with torch.no_grad():
                _hidden_states(made, setting, tokens)
    head = made.get_output_embeddings().weight
    return Passes(
        forward=forward,
        saved=saved,
        backward_top=tops[0],
        backward_rest=rest,
        scoring=ledger.take_peak(),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        trained=sum(p.numel() for p in trained),
        quantisable=sum(
            p.numel()
            for name, p in made.named_parameters()
            if p.ndim == 2 and p is not head and "embed" not in name and ".lora_" not in name
        ),
    )


def _first_layers(model: Any, setting: Setting, layers: int) -> Any:
    """On the meta device: shapes alone."""
    config = copy.deepcopy(model)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, dtype=setting.weights
        )
        if setting.lora is not None:
            add_adapter(made, **setting.lora)
    if setting.checkpointing:
        recompute_layers(made)
    if setting.tile_tokens:
        run_in_tiles(made, setting.tile_tokens)
    return made.train()


def _make_fake(made: nn.Module) -> None:
    """Meta tensors become fake ones of the CPU; a tied weight stays one."""
    fakes: dict[int, Any] = {}
    for module in made.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    fakes[id(tensor)] = (new, tensor)
                place[name] = fakes[id(tensor)][0]


@contextlib.contextmanager
def _after_last_layer(made: nn.Module, heard: Callable[[], None]) -> Iterator[None]:
    """`heard` is called when the backward pass is through the last layer."""

    def listen(module: Any, arguments: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: heard())

    handle = decoder_layers(made)[-2].register_forward_hook(listen)
    try:
        yield
    finally:
        handle.remove()


def _hidden_states(made: Any, setting: Setting, tokens: int) -> Tensor:
    """As `Policy.hidden_states`, every token a completion token."""
    ids, rows = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)
    with _autocast(setting.compute):
        output = made.base_model(input_ids=ids, position_ids=rows[None], use_cache=False)
    return output.last_hidden_state[0].to(setting.compute).index_select(0, rows)


class _Loss(torch.autograd.Function):
    """As the fused loss: a number, whose gradient is there already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(hidden))
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient


def _autocast(compute: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", compute)


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has dropped."""

    def __init__(self, known: list[Tensor | None]) -> None:
        """`known`: tensors that were there before and are not counted."""
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.known = [t.untyped_storage() for t in known if t is not None]
        for storage in self.known:
            self.storages[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage())
        return made

    def _enter(self, storage: Any) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def leave(_: Any) -> None:
            self.live -= num_bytes
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, leave)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


# --- attention over fake tensors ------------------------------------------------------------------


def _one_sequence(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The side-by-side attention of a pack of one sequence, which no back end and no sharing of
    prompts exceeds: what `attention/` gathers at a time is bounded by it."""
    columns = torch.arange(query.shape[2], device=query.device)
    block = SideBySideBlock(columns, columns, columns, shape=(1, len(columns)), taken=columns)
    gathered = block.gather(*(x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)))
    out = attend(block, *gathered, Scoring(scaling))
    return out[None], None


AttentionInterface.register(ATTENTION, _one_sequence)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
