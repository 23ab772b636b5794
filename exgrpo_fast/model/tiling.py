"""What treats every token by itself, over tiles of tokens: one tile's intermediate values live.

The MLPs and norms of a decoder are such functions, and over tiles they are the same functions. An
MLP's intermediate values are the largest of a layer (gate, up, their product, `intermediate_size`
wide each, and the gradients of all); a norm computes in float32. Here the input alone is kept; in
the backward pass each tile is made again and differentiated by itself. The gradients of the weights
are summed over tiles in float32, those of linear layers inside the product, and rounded once.

A checkpointed layer is made again as far as the input of its MLP, and no further where nothing
behind that needs the output: the MLP runs forward twice, as with checkpointing alone, and the norms
three times instead of twice. Without checkpointing all of it runs twice instead of once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from exgrpo_kernels.runtime import weight_gradient_add

Run = Callable[[Tensor], Tensor]  # [n, D] -> [n, D']


def run_in_tiles(model: Any, tile_tokens: int) -> None:
    """Let the MLPs and norms of a transformers decoder run over tiles of `tile_tokens`.

    No module and no weight gets another name: what changes is the `forward` of the instance.
    """
    layers = decoder_layers(model)
    norms = [child for parent in (model.base_model, *layers) for child in _norms(parent)]
    for module in (*filter(None, map(dense_mlp, layers)), *norms):
        module.forward = partial(run_tiled, module, module.forward, tile_tokens)


def decoder_layers(model: Any) -> list[nn.Module]:
    """By structure: the list of modules that is as long as the config says the model is deep."""
    depth = model.config.num_hidden_layers
    return list(
        next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    )


def dense_mlp(layer: nn.Module) -> nn.Module | None:
    """The module `mlp`, a function of the hidden states alone.

    None for a mixture of experts: an expert sees the tokens that are routed to it, a part of the
    pack, and tiles would cut these few into fewer.
    """
    mlp = getattr(layer, "mlp", None)
    if mlp is None or hasattr(mlp, "experts") or len(signature(mlp.forward).parameters) != 1:
        return None
    return mlp


def _norms(parent: nn.Module) -> list[nn.Module]:
    return [child for child in parent.children() if "norm" in type(child).__name__.lower()]


def run_tiled(module: nn.Module, run: Run, tile_tokens: int, x: Tensor) -> Tensor:
    """`run(x)` for x [..., D], `tile_tokens` rows at a time; `module` owns the weights of `run`."""
    rows_ND = x.reshape(-1, x.shape[-1])
    if len(rows_ND) <= tile_tokens:
        return run(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (x.requires_grad or trained):
        kept_ND = _KeptInput.apply(rows_ND)
        return _Tiled.apply(run, tile_tokens, x.shape, kept_ND.grad_fn, kept_ND, *trained)
    return _forward(run, tile_tokens, x.shape, rows_ND)


def _forward(run: Run, tile_tokens: int, shape: torch.Size, rows_ND: Tensor) -> Tensor:
    """[..., D'] for the rows of x `shape`, and no view of it: FSDP2 has hooks at its outputs."""
    first = run(rows_ND[:tile_tokens])
    out = first.new_empty(*shape[:-1], first.shape[-1])
    out_ND = out.view(-1, out.shape[-1])
    out_ND[:tile_tokens] = first
    del first
    for start in range(tile_tokens, len(rows_ND), tile_tokens):
        out_ND[start : start + tile_tokens] = run(rows_ND[start : start + tile_tokens])
    return out


class _KeptInput(torch.autograd.Function):
    """The same rows; what the backward pass needs is kept at this node, before the tiles run.

    That is what lets a checkpointed layer stop here when it is made again.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND)
        ctx.noise = _Noise(rows_ND.device)
        return rows_ND.view_as(rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Tensor:
        return grad_ND


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        tile_tokens: int,
        shape: torch.Size,
        kept: Any,
        rows_ND: Tensor,
        *trained: nn.Parameter,
    ) -> Tensor:
        """`kept`: the node of `_KeptInput` that made `rows_ND`."""
        ctx.run, ctx.tile_tokens, ctx.kept, ctx.trained = run, tile_tokens, kept, trained
        ctx.autocast = _autocast_of(rows_ND.device.type)
        return _forward(run, tile_tokens, shape, rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows_ND,) = ctx.kept.saved_tensors
        grad_ND = grad.reshape(len(rows_ND), -1)
        sums = {p: _Sum(p) for p in ctx.trained}
        grad_rows_ND = torch.empty_like(rows_ND)
        with ctx.kept.noise.again(), ctx.autocast(), torch.enable_grad(), _SummedLinears(sums):
            for start in range(0, len(rows_ND), ctx.tile_tokens):
                tile = slice(start, start + ctx.tile_tokens)
                x = rows_ND[tile].detach().requires_grad_()
                grad_rows_ND[tile], *of_weights = torch.autograd.grad(
                    ctx.run(x), [x, *ctx.trained], grad_ND[tile], allow_unused=True
                )
                for total, made in zip(sums.values(), of_weights, strict=True):
                    if made is not None:  # not one that `_SummedLinears` has added
                        total.add(made)
                del of_weights
        return None, None, None, None, grad_rows_ND, *(total.take() for total in sums.values())


class _Sum:
    """The gradient of one weight over tiles: float32 where the weight is coarser, rounded once."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.total: Tensor | None = None

    def add(self, made: Tensor) -> None:
        if self.total is None:
            self.total = made.to(torch.promote_types(made.dtype, torch.float32))
        else:
            self.total += made

    def add_product(self, grad_NO: Tensor, rows_NI: Tensor) -> None:
        """+= grad^T rows, never rounded to the dtype of the two."""
        is_first = self.total is None
        if self.total is None:
            dtype = torch.promote_types(grad_NO.dtype, torch.float32)
            self.total = torch.empty_like(self.weight, dtype=dtype)
        weight_gradient_add(self.total, grad_NO, rows_NI, overwrite=is_first)

    def take(self) -> Tensor | None:
        """None where no tile has come, as of an adapter that is switched off."""
        total, self.total = self.total, None
        return None if total is None else total.to(self.weight.dtype)


class _SummedLinears(TorchFunctionMode):
    """Linear layers under it add the gradients of their weights to `sums`; autograd gets none."""

    def __init__(self, sums: dict[nn.Parameter, _Sum]) -> None:
        super().__init__()
        self.sums = sums

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self._linear if func is F.linear else func
        return call(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        if weight not in self.sums:
            return F.linear(input, weight, bias)
        out = _SummedLinear.apply(input, weight, self.sums[weight])
        return out if bias is None else out + bias.to(out.dtype)


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: _Sum) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight.detach())
        ctx.total = total
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.total.add_product(grad_NO, x)
        return grad_NO @ weight, None, None


class _Noise:
    """The state of the generators at one moment: dropout draws the same once more."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def _autocast_of(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The autocast of this moment, to be entered once more."""
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )
