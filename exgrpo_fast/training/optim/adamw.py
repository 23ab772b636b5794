"""AdamW in three sizes. The update is the same; what is kept between two updates differs.

    kind          weights   state of a weight                                     bytes, all in all
    adamw         float32   two float32 moments                                   16
    flash_adamw   bfloat16  16-bit residual to the float32 weight, 8-bit moments   8
    adamw_8bit    bfloat16  8-bit moments, updates rounded at random               6

All in all: weight, gradient in the weight's dtype, state. adamw_8bit takes float32 weights too (10
bytes). The first is torch's, the second flashoptim's (bfloat16 weight + residual = the float32
weight, exactly), the third torchao's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from exgrpo_fast.core.dtensor import from_local_shard, local_shard, shard_like
from exgrpo_fast.core.errors import UserError

Kind = Literal["adamw", "flash_adamw", "adamw_8bit"]
_PACKAGES = {"flash_adamw": "flashoptim", "adamw_8bit": "torchao"}
# flashoptim hands out its residual as bits of the weight's dtype: one pattern in 256 is no finite number
RESIDUAL = "error_bits"
BLOCK = 256  # weights that share a scale in adamw_8bit
GROUP = 32  # weights that share a scale in flash_adamw
# flashoptim keeps a moment under two keys with these ends
CODES, SCALES = "::quantized", "::scales"
PLAIN_BFLOAT16 = (
    "plain bfloat16 weights do not learn at the learning rates of RL: at 1e-6 about 98 % of the "
    "updates of a step are below half a step of the dtype and are rounded away"
)


class OptimiserError(UserError):
    """An optimiser that cannot run here, as one line to the user."""


def make_adamw(
    kind: Kind,
    parameters: list[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not. OptimiserError where its package or its device is missing."""
    low = any(p.dtype != torch.float32 for p in parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    same: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    if kind == "adamw":
        if low:
            raise OptimiserError(f"train.optimizer adamw: {PLAIN_BFLOAT16}")
        return torch.optim.AdamW(groups, fused=True, **same)
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise OptimiserError(
            f"train.optimizer {kind} needs {package}: pip install 'exgrpo-fast[optim8]'"
        )
    if kind == "adamw_8bit":
        filled = [group for group in groups if group["params"]]
        torchao: Any = importlib.import_module("torchao.optim")
        return torchao.AdamW8bit(filled, block_size=BLOCK, bf16_stochastic_round=True, **same)
    if not low:
        raise OptimiserError(f"train.optimizer {kind} is for model.weights bfloat16")
    if any(not p.is_cuda for p in parameters):
        raise OptimiserError(f"train.optimizer {kind} runs on a CUDA device only")
    flashoptim: Any = importlib.import_module(package)
    return flashoptim.FlashAdamW(groups, master_weight_bits=32, **same)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@contextlib.contextmanager
def repeatable(optimiser: torch.optim.Optimizer, update: int, rank: int = 0):
    """What is rounded at random is rounded by the number of the update and the rank, so that a
    resumed run goes on as it would have. On a CPU nothing is compiled: that takes a minute and saves none."""
    if type(optimiser).__module__.partition(".")[0] != "torchao":
        yield
        return
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    devices = sorted({p.get_device() for p in parameters if p.is_cuda})
    stance = contextlib.nullcontext() if devices else torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=devices), stance:
        torch.manual_seed(update + (rank << 32))
        yield


# --- shards ---------------------------------------------------------------------------------------
# The optimisers step on this rank's shards as plain tensors, so they need not know DTensors.


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's shard, in the same memory; a plain parameter as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local().detach()
    return nn.Parameter(local, requires_grad=parameter.requires_grad)


class Elements(NamedTuple):
    """Where this rank's shard lies in the flattened parameter."""

    first: int
    count: int
    full: int  # of every shard but the last ones

    @staticmethod
    def of(parameter: Tensor) -> Elements:
        size = parameter.numel()
        if not isinstance(parameter, DTensor):
            return Elements(0, size, size)
        rows, mesh = len(parameter), parameter.device_mesh
        full = -(-rows // mesh.size()) * (size // rows)
        return Elements(
            min(full * mesh.get_local_rank(), size), local_shard(parameter).numel(), full
        )

    def blocks(self, size: int) -> Tensor:
        """int64 [count]: the block of `size` weights of the whole parameter that each lies in."""
        return (self.first + torch.arange(self.count)) // size


def is_quantised(parameter: Tensor) -> bool:
    """Whether adamw_8bit quantises its moments: torchao's rule for the whole parameter, of which
    every shard has to begin at a block. Then blocks are the same for any number of ranks."""
    size = parameter.numel()
    return size >= 4096 and size % BLOCK == 0 and Elements.of(parameter).full % BLOCK == 0


def quantise_by_whole(
    optimiser: torch.optim.Optimizer, whole_of: Mapping[nn.Parameter, nn.Parameter]
) -> None:
    """Have adamw_8bit decide by `is_quantised`, where torchao would by the size of a shard.
    `whole_of`: of each parameter that it steps on."""
    maker: Any = optimiser

    def new_buffer(parameter: nn.Parameter, signed: bool) -> Tensor:
        shard = local_parameter(parameter)
        if is_quantised(whole_of.get(parameter, parameter)) and shard.numel():
            return maker._subclass_zeros(shard, signed, BLOCK)
        return torch.zeros_like(shard)

    maker._new_buffer = new_buffer


# --- state ----------------------------------------------------------------------------------------
# A checkpoint holds a quantised moment as codes in the parameter's shape, and a scale for each block
# of the whole parameter. torchao's is a tensor subclass made of those; flashoptim's are two entries.


def flatten(
    state: Mapping[Any, Mapping[str, Any]],
    parameters: Sequence[Tensor] = (),
    *,
    has_blocks: bool = False,
) -> dict[str, dict[str, Any]]:
    """A state in which every tensor is a plain tensor or a DTensor, and bits are integers.

    `parameters`: by their places, where they may be sharded; then it is a collective of all ranks.
    `has_blocks`: of adamw_8bit.
    """
    flat = {}
    for place, entries in state.items():
        parameter = parameters[int(place)] if parameters else None
        if isinstance(parameter, DTensor) and not has_whole_groups(parameter):
            entries = _without_groups(entries)
        flat[str(place)] = {
            key: _flatten(key, value, parameter, has_blocks) for key, value in entries.items()
        }
    return flat


def _flatten(key: str, value: Any, parameter: Tensor | None, has_blocks: bool) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if key == RESIDUAL:
        value = value.view(torch.int16)
    if key.endswith(SCALES) and isinstance(parameter, DTensor):
        return _gather_scale(value, parameter, GROUP)
    parts: dict[str, Tensor] | None = None
    if hasattr(value, "__tensor_flatten__"):
        subclass: Any = value
        parts = {part: getattr(value, part) for part in subclass.__tensor_flatten__()[0]}
    elif has_blocks and parameter is not None and is_quantised(parameter):  # an empty shard
        none = value.new_empty(0, dtype=torch.float32)
        parts = {"codes": value.to(torch.uint8), "scale": none, "qmap": none}
    if parts is None:
        return _as_shard(value, parameter)
    if isinstance(parameter, DTensor):
        codes = _as_shard(parts["codes"], parameter)
        parts |= {"codes": codes, "scale": _gather_scale(parts["scale"], parameter, BLOCK)}
    return {"quantised": parts}


def _as_shard(value: Tensor, parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return from_local_shard(parameter, value, parameter.device_mesh)


def _gather_scale(scale: Tensor, parameter: DTensor, block: int) -> Tensor:
    """[blocks of the whole parameter], of `block` weights each. The last shards have fewer: all are
    padded."""
    padded = scale.new_zeros(Elements.of(parameter).full // block)
    padded[: len(scale)] = scale
    sharded = DTensor.from_local(padded, parameter.device_mesh, [Shard(0)], run_check=False)
    return sharded.full_tensor()[: -(-parameter.numel() // block)]


def restore(
    optimiser: torch.optim.Optimizer, saved: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Put back a flattened state; keys are places in `parameters`, in the optimiser's own order."""
    groups = optimiser.state_dict()["param_groups"]
    state = {}
    for place, entries in saved.items():
        parameter = parameters[int(place)]
        state[int(place)] = {
            key: _unflatten(optimiser, key, value, parameter)
            for key, value in _own_groups(entries, parameter).items()
        }
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _unflatten(
    optimiser: torch.optim.Optimizer, key: str, value: Any, parameter: nn.Parameter
) -> Any:
    maker: Any = optimiser
    if hasattr(maker, "_new_buffer") and key in ("exp_avg", "exp_avg_sq"):
        moment = maker._new_buffer(parameter, signed=key == "exp_avg")
        _fill(moment, value, parameter)
        return moment
    if not isinstance(value, Tensor):
        return value
    found = local_shard(shard_like(value, parameter))
    return found.view(parameter.dtype) if key == RESIDUAL else found


def _fill(moment: Any, saved: Any, parameter: Tensor) -> None:
    """Bit for bit, but where one of the two is quantised and the other is not: then the number of
    ranks has moved the shards off the blocks."""
    if isinstance(saved, Tensor):
        moment.copy_(local_shard(shard_like(saved, parameter)))
        return
    parts, place = saved["quantised"], Elements.of(parameter)
    codes = local_shard(shard_like(parts["codes"], parameter))
    if hasattr(moment, "codes"):
        moment.codes.copy_(codes)
        first = place.first // BLOCK
        moment.scale.copy_(parts["scale"][first : first + len(moment.scale)])
        return
    values = parts["qmap"].cpu()[codes.cpu().flatten().long()]
    moment.copy_((values * parts["scale"].cpu()[place.blocks(BLOCK)]).view(codes.shape))


# --- the groups of flash_adamw --------------------------------------------------------------------
# It counts them from the first weight of a shard. Where that is the first of a group of the whole
# parameter, codes and scales are those of one process. Where it is not (a vector, a width that is no
# multiple of 32), a checkpoint holds the moments themselves, and flashoptim quantises what it reads.


def has_whole_groups(parameter: Tensor) -> bool:
    return not isinstance(parameter, DTensor) or Elements.of(parameter).full % GROUP == 0


def _grouped_moments(entries: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix(CODES) for key in entries if key.endswith(CODES)]


def _without_groups(entries: Mapping[str, Any]) -> dict[str, Any]:
    """With this shard's moments in float32 in place of codes and scales."""
    found = dict(entries)
    for moment in _grouped_moments(entries):
        codes, scales = found.pop(moment + CODES), found.pop(moment + SCALES)
        group_of = torch.arange(codes.numel(), device=codes.device) // GROUP
        found[moment] = decode(codes, scales[group_of])
    return found


def _own_groups(entries: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What a checkpoint has of the moments that this rank steps on: codes with their scales, or
    moments in float32."""
    found, place = dict(entries), Elements.of(parameter)
    for moment in _grouped_moments(entries):
        if has_whole_groups(parameter):
            first = place.first // GROUP
            count = -(-place.count // GROUP)
            found[moment + SCALES] = found[moment + SCALES][first : first + count]
            continue
        codes, scales = found.pop(moment + CODES), found.pop(moment + SCALES)
        own = local_shard(shard_like(codes, parameter)).cpu()
        found[moment] = decode(own, scales.cpu()[place.blocks(GROUP)])
    return found


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 moments in the shape of `codes`, of which each has its scale, in flashoptim's format
    (its `dequantize`): int8 first moments behind a softsign, uint8 roots of the second moments."""
    scale = scales.view(torch.float16).float().view(codes.shape)
    if codes.dtype == torch.int8:
        share = codes.float() / 127
        return share / (2 - share.abs()) * scale
    return (codes.float() / 255 * scale).square()
