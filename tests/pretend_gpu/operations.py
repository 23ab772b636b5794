"""One operation of PyTorch on the pretend GPU: CUDA's rules, the host's waits, then the CPU's values.

The rules were read in torch 2.11 to 2.13 (aten/src/ATen/native/cuda, TensorAdvancedIndexing.cpp,
Blas.cpp). What an operation on a real GPU refuses is refused here; what stops the host is logged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from pretend_gpu import attention, collectives, machine
from pretend_gpu.cuda_api import device_of
from pretend_gpu.tensor import PretendTensor, is_cuda, on_device, values_of
from pretend_gpu.waits import place_of_caller
from torch import Tensor
from torch._library.custom_ops import OPDEFS

aten = torch.ops.aten


class DeviceMix(RuntimeError):
    """Tensors of the host and of the GPU in one operation."""


WAITS = {
    aten._local_scalar_dense: "item()",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_consecutive: "unique_consecutive",
    aten.unique_dim: "unique",
    aten.bincount: "bincount",
    aten.equal: "equal",
    aten.is_nonzero: "is_nonzero",
}
READS_INDEX = {
    aten.index,
    aten._unsafe_index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
    aten._unsafe_index_put,
}
COPIES = {aten.copy_, aten._to_copy, aten._copy_from}
# take a CPU tensor of no dimension as a number, as the pointwise ones do
TAKES_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten.where}
# no deterministic version for floating point (docs of torch.use_deterministic_algorithms)
NOT_DETERMINISTIC = {aten.cumsum, aten.cumsum_, aten.histc, aten.put_, aten.bincount}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}
RESHAPES_IN_PLACE = {aten.resize_, aten.set_, aten.t_, aten.squeeze_, aten.unsqueeze_}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives; kernels of custom operators run their own body."""
    gpu = machine.current()
    kind, tensors = (
        func.overloadpacket,
        [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)],
    )
    on_gpu = any(isinstance(x, PretendTensor) for x in tensors)
    to_device = is_cuda(kwargs.get("device"))
    _check_generator(kwargs.get("generator"), on_gpu or to_device)
    if not on_gpu and not to_device:
        return gpu.on_host(func, args, kwargs)
    if func.namespace in collectives.NAMESPACES:
        return collectives.run(func, args, kwargs)
    if func.namespace == "torch_attn":
        return attention.run(func, args, kwargs)
    if f"{func.namespace}::{func._schema.name.partition('::')[2]}" in OPDEFS:
        with gpu.modes():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    if _is_composite(func):  # below autograd those arrive whole
        with gpu.factories():
            return func.decompose(*args, **kwargs)
    if kind in COPIES:
        return copy(gpu, kind, func, args, kwargs)
    if kind in RESHAPES_IN_PLACE:
        raise NotImplementedError(f"{func} changes the shape of a tensor in place")
    _check_devices(func, tensors, args)
    _check_determinism(func, args)
    if kind in PRODUCTS:
        _check_product(func, args, kwargs)
    if kind == aten._assert_async:
        return _assert(args)
    if kind == aten._fused_sdp_choice:
        return _attention_kernel(gpu, args, kwargs)
    _note_waits(gpu, func, args, kwargs)
    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        kwargs = {k: v for k, v in kwargs.items() if k in {a.name for a in func._schema.arguments}}
    draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    with gpu.default_random_state() if draws else nullcontext():
        if kind in PRODUCTS and _out_dtype(func, args, kwargs) is not None:
            return _wide_product(func, args, kwargs)
        found = func(*pytree.tree_map(values_of, args), **pytree.tree_map(values_of, kwargs))
    return _as_written(func, args, kwargs, found)


@cache
def _is_composite(func: Any) -> bool:
    return func._can_decompose()


# ---- copies between host and device --------------------------------------------------------------


def copy(gpu: machine.PretendGpu, kind: Any, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`copy_` and `to`: a blocking copy waits for the stream; one to the host arrives at a wait."""
    blocking = not (
        kwargs.get("non_blocking") or (kind == aten.copy_ and len(args) > 2 and args[2])
    )
    if kind == aten.copy_:
        target, source = args[0], args[1]
        if isinstance(target, PretendTensor) == isinstance(source, PretendTensor):
            target.values.copy_(values_of(source))
        elif isinstance(target, PretendTensor):
            gpu.note_upload(source, blocking)
            target.values.copy_(source)
        else:
            gpu.download(target, source.values, blocking)
        return target
    source, device = args[0], kwargs.get("device")
    wanted = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    here = isinstance(source, PretendTensor)
    made = func(values_of(source), **wanted)
    if here and (device is None or is_cuda(device)):
        return PretendTensor(made)
    if not here:
        gpu.note_upload(source, blocking)
        return PretendTensor(made)
    arrived = gpu.pinned_like(made) if not blocking else torch.empty_like(made)
    gpu.download(arrived, made, blocking)
    return arrived


# ---- rules ---------------------------------------------------------------------------------------


def _check_devices(func: Any, tensors: Iterable[Tensor], args: Any) -> None:
    kind = func.overloadpacket
    if kind in READS_INDEX:
        return _check_index(args)
    numbers = torch.Tag.pointwise in func.tags or kind in TAKES_NUMBERS
    host = [x for x in tensors if not isinstance(x, PretendTensor) and not (numbers and not x.ndim)]
    on_gpu = any(isinstance(x, PretendTensor) for x in tensors)
    if host and on_gpu and not func._schema.name.startswith("aten::_fused_"):
        raise DeviceMix(
            f"{func}: Expected all tensors to be on the same device, but found at least two "
            f"devices, cuda:0 and cpu {[tuple(x.shape) for x in host]}: {place_of_caller()}"
        )


def _check_index(args: Any) -> None:
    target, indices, *values = args
    on_gpu = isinstance(target, PretendTensor)
    if not on_gpu and any(isinstance(i, PretendTensor) for i in indices):
        raise DeviceMix(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu): "
            f"{place_of_caller()}"
        )
    put = values[0] if values and isinstance(values[0], Tensor) else None
    if put is not None and isinstance(put, PretendTensor) != on_gpu and put.ndim:
        raise DeviceMix(f"index_put_: values and self on different devices: {place_of_caller()}")


def _check_generator(generator: torch.Generator | None, on_gpu: bool) -> None:
    if generator is None:
        return
    found, wanted = device_of(generator).type, "cuda" if on_gpu else "cpu"
    if found != wanted:
        raise RuntimeError(
            f"Expected a '{wanted}' device type for generator but found '{found}': "
            f"{place_of_caller()}"
        )


def _check_determinism(func: Any, args: Any) -> None:
    refused = func.overloadpacket in NOT_DETERMINISTIC and args[0].is_floating_point()
    if refused and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            f"{func} does not have a deterministic implementation, but you set "
            f"'torch.use_deterministic_algorithms(True)': {place_of_caller()}"
        )


def _check_product(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """cuBLAS: one floating dtype for both factors; with `out_dtype` Blas.cpp's own rules."""
    bias, a, b = _operands(func, args)
    workspaces = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if torch.are_deterministic_algorithms_enabled() and workspaces not in (":4096:8", ":16:8"):
        raise RuntimeError(
            f"Deterministic behavior was enabled [...] you must set an environment variable "
            f"before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG: {place_of_caller()}"
        )
    if a.dtype != b.dtype:
        raise RuntimeError(
            f"{func}: expected mat1 and mat2 to have the same dtype: {place_of_caller()}"
        )
    if not a.is_floating_point():
        raise RuntimeError(f'"{func}_cuda" not implemented for {a.dtype}: {place_of_caller()}')
    wanted, out = _out_dtype(func, args, kwargs), kwargs.get("out")
    if wanted is None:
        return
    widens = wanted == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)
    if wanted != a.dtype and not widens:
        raise RuntimeError(
            f"{func}: out_dtype must be the input dtype, or float32 for 16-bit inputs"
        )
    if out is not None and out.dtype != wanted:
        raise RuntimeError(f"{func}: out_dtype must be the dtype of the provided out tensor")
    if bias is not None and bias.dtype not in (wanted, a.dtype):
        raise RuntimeError(f"{func}: self dtype must match either out_dtype or mat1 dtype")


def _assert(args: Any) -> None:
    if not bool(args[0].values):
        raise RuntimeError(
            f"CUDA error: device-side assert triggered {args[1:]}: {place_of_caller()}"
        )


def _attention_kernel(gpu: machine.PretendGpu, args: Any, kwargs: dict[str, Any]) -> int:
    """0: the plain composition, whose values every kernel gives. Noted where CUDA has no other: the
    flash kernel takes 16 bits and no mask, and the one that takes both has no shared key heads."""
    query, key, mask = args[0], args[1], args[3] if len(args) > 3 else None
    is_flash = query.dtype in (torch.float16, torch.bfloat16) and mask is None
    if query.shape[1] != key.shape[1] and not is_flash:
        gpu.whole_scores.append(place_of_caller())
    return 0


def _note_waits(gpu: machine.PretendGpu, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    kind = func.overloadpacket
    if kind in WAITS:
        gpu.wait(WAITS[kind])
    elif func == aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        gpu.wait("repeat_interleave without output_size")
    elif kind in READS_INDEX:
        indices = [i for i in args[1] if i is not None]
        if any(not isinstance(i, PretendTensor) for i in indices):
            gpu.wait("index on the host")
        elif any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not _fills(args):
            gpu.wait("boolean mask")


def _fills(args: Any) -> bool:
    """`x[mask] = number` is a masked_fill."""
    indices = [i for i in args[1] if i is not None]
    accumulates = len(args) > 3 and args[3]
    return len(indices) == 1 and len(args) > 2 and args[2].numel() == 1 and not accumulates


# ---- products with out_dtype, which a CPU does not have ------------------------------------------


def _operands(func: Any, args: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """(what is added or None, left, right)."""
    adds = "add" in func._schema.name
    return (args[0] if adds else None, *args[adds : adds + 2])


def _out_dtype(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    names = [argument.name for argument in func._schema.arguments]
    if "out_dtype" not in names:
        return None
    place = names.index("out_dtype")
    return args[place] if place < len(args) else kwargs["out_dtype"]


def _wide_product(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Operands of 16 bits, products and sums of float32."""
    bias, a, b = _operands(func, args)
    dtype = _out_dtype(func, args, kwargs)
    wide = torch.promote_types(a.dtype, torch.float32)
    product = kwargs.get("alpha", 1) * (values_of(a).to(wide) @ values_of(b).to(wide))
    beta = kwargs.get("beta", 1)
    if bias is not None and beta:
        product = product + beta * values_of(bias).to(wide)
    out = kwargs.get("out")
    if out is None:
        return PretendTensor(product.to(dtype))
    out.values.copy_(product)
    return out


# ---- results -------------------------------------------------------------------------------------


def _as_written(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> Any:
    """Results on the device; what an operation wrote to is the very tensor that it was given."""
    schema = func._schema
    if not any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns):
        return pytree.tree_map(on_device, found)
    written = [
        kwargs.get(a.name) if a.kwarg_only or i >= len(args) else args[i]
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return written[0] if len(schema.returns) == 1 else tuple(written)
