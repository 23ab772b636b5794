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
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exgrpo_fast.core.dtensor import shard_like
from exgrpo_fast.core.errors import UserError

Kind = Literal["adamw", "flash_adamw", "adamw_8bit"]
_PACKAGES = {"flash_adamw": "flashoptim", "adamw_8bit": "torchao"}
# flashoptim hands out its residual as bits of the weight's dtype: one pattern in 256 is no finite number
RESIDUAL = "error_bits"
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
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        filled = [group for group in groups if group["params"]]
        return AdamW8bit(filled, bf16_stochastic_round=True, **same)
    if not low:
        raise OptimiserError(f"train.optimizer {kind} is for model.weights bfloat16")
    if any(not p.is_cuda for p in parameters):
        raise OptimiserError(f"train.optimizer {kind} runs on a CUDA device only")
    from flashoptim import FlashAdamW  # pyright: ignore[reportMissingImports]

    return FlashAdamW(groups, master_weight_bits=32, **same)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@contextlib.contextmanager
def repeatable(optimiser: torch.optim.Optimizer, update: int):
    """What is rounded at random is rounded by the number of the update, so that a resumed run goes
    on as it would have. On a CPU nothing is compiled: that takes a minute and saves none."""
    if type(optimiser).__module__.partition(".")[0] != "torchao":
        yield
        return
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    devices = sorted({p.get_device() for p in parameters if p.is_cuda})
    stance = contextlib.nullcontext() if devices else torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(devices=devices), stance:
        torch.manual_seed(update)
        yield


# --- state ----------------------------------------------------------------------------------------
# A quantised moment is a tensor subclass made of plain tensors; a checkpoint holds those.


def flatten(state: Any) -> Any:
    """A nested state in which every tensor is a plain tensor or a DTensor, and bits are integers."""
    if isinstance(state, Mapping):
        return {
            str(key): value.view(torch.int16) if key == RESIDUAL else flatten(value)
            for key, value in state.items()
        }
    if not isinstance(state, DTensor) and hasattr(state, "__tensor_flatten__"):
        parts, _ = state.__tensor_flatten__()
        return {"quantised": {part: getattr(state, part) for part in parts}}
    return state


def restore(
    optimiser: torch.optim.Optimizer, saved: Mapping[str, Any], parameters: list[nn.Parameter]
) -> None:
    """Put back a flattened state; keys are places in `parameters`, in the optimiser's own order."""
    groups = optimiser.state_dict()["param_groups"]
    state = {
        int(place): {
            key: _unflatten(optimiser, key, value, parameters[int(place)])
            for key, value in entries.items()
        }
        for place, entries in saved.items()
    }
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _unflatten(
    optimiser: torch.optim.Optimizer, key: str, value: Any, parameter: nn.Parameter
) -> Any:
    if isinstance(value, Tensor):
        found = shard_like(value, parameter)
        return found.view(parameter.dtype) if key == RESIDUAL else found
    if not (isinstance(value, Mapping) and value.keys() == {"quantised"}):
        return value
    maker: Any = optimiser
    moment = maker._new_buffer(parameter, signed=key == "exp_avg")
    for part, tensor in value["quantised"].items():
        getattr(moment, part).copy_(tensor)
    return moment
