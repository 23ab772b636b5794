"""The pretend GPU itself: what lies between host and device, and the patches that show it to torch.

    with pretend_gpu() as gpu:
        ...  # torch.cuda is available, device="cuda" works
    assert len(gpu.waits) <= 1

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) on the
values behind the tensors; everything else runs PyTorch's CPU kernels on them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # loaded here: it looks for CUDA's own functions where torch.cuda is available
from pretend_gpu import collectives, cuda_api, functions, kernels
from pretend_gpu.tensor import PretendTensor, is_cuda
from pretend_gpu.waits import Waits
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_running: list[PretendGpu] = []


def current() -> PretendGpu:
    """The one whose block is open."""
    if not _running:
        raise RuntimeError("a pretended tensor was used outside of `with pretend_gpu()`")
    return _running[-1]


class PretendGpu:
    """Host waits, pinned memory, copies under way, and the device's own random state."""

    def __init__(self) -> None:
        self.waits = Waits()
        self.whole_scores: list[str] = []  # where attention held its scores [B, heads, Q, K]
        self.random_state = torch.Generator().manual_seed(0).get_state()
        self._pinned: dict[int, Any] = {}
        self._arriving: list[tuple[Tensor, Tensor]] = []

    # --- waiting ---

    def wait(self, kind: str) -> None:
        """The host waits until the stream is empty: what was copied to it has arrived."""
        self.waits.note(kind)
        self.finish_downloads()

    def finish_downloads(self) -> None:
        for target, values in self._arriving:
            target.copy_(values)
        self._arriving.clear()

    # --- copies ---

    def note_upload(self, source: Tensor, blocking: bool) -> None:
        if source.numel() == 0:
            return  # nothing is copied
        if blocking:
            self.wait("blocking copy to the device")
        elif not self.is_pinned(source):
            self.wait("non_blocking copy from pageable memory")

    def download(self, target: Tensor, values: Tensor, blocking: bool) -> None:
        """Device to host. One into pinned memory that is not waited for is poison until it is."""
        if blocking or not self.is_pinned(target):
            self.wait("copy to the host")
            target.copy_(values)
            return
        self._arriving.append((target, values.clone()))
        target.fill_(poison(target.dtype))

    # --- memory ---

    def pinned_like(self, values: Tensor) -> Tensor:
        return self.pin(torch.empty_like(values))

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage  # held, so that no other tensor gets its place
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation without device tensors: the CPU's own, and pinned memory."""
        kind = func.overloadpacket
        if kind == aten.is_pinned:
            return self.is_pinned(args[0])
        if kind in (aten._pin_memory, aten.pin_memory):
            return self.pin(args[0].clone())
        pins = kwargs.get("pin_memory")
        made = func(*args, **({**kwargs, "pin_memory": False} if pins else kwargs))
        return self.pin(made) if pins else made

    # --- random numbers ---

    @contextlib.contextmanager
    def default_random_state(self) -> Iterator[None]:
        """Numbers of the device's generator, not of the host's."""
        host = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(host)

    # --- modes ---

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """Factories and functions know cuda. By the thread, as modes are."""
        with _Functions(self), _Operations():
            yield

    def factories(self) -> contextlib.AbstractContextManager[Any]:
        """Below autograd, where functions are operations already, factories alone have to know."""
        return _Operations()


def poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


class _Operations(TorchDispatchMode):
    """Operations without a pretended tensor among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from pretend_gpu import operations  # it needs this module

        return operations.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What has to be seen above autograd: autocast, factories that read the host, backward."""

    def __init__(self, gpu: PretendGpu) -> None:
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in functions.FROM_HOST and is_cuda(kwargs.get("device")):
            return functions.from_host(func, args, kwargs)
        if func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], PretendTensor):
            return functions.moved(func, args, kwargs)
        if args and isinstance(args[0], PretendTensor):
            if func is Tensor.new_tensor:
                return functions.new_tensor(*args, **kwargs)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], functions.with_index_tensors(args[1]), *args[2:])
        args, kwargs = functions.autocast(func, args, kwargs)
        return func(*args, **kwargs)


def keeps_ties(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`Module._apply` that keeps shared parameters shared, as PyTorch does on a real GPU by changing
    a parameter in place; between tensors of two types it makes a new one at every place."""

    def applied(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                places.setdefault(id(parameter), []).append((owner, name))
        apply(module, *args, **kwargs)
        for (owner, name), *others in places.values():
            for other, other_name in others:
                other._parameters[other_name] = owner._parameters[name]
        return module

    return applied


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """One pretend GPU, for all threads that the block starts."""
    gpu = PretendGpu()

    def with_modes(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with gpu.modes():
                return function(*args, **kwargs)

        return called

    new_thread = with_modes(threading.Thread.run)
    # a mode is off while a function is handled, and layers are computed again in the backward pass
    run_backward = with_modes(torch.autograd._engine_run_backward)  # pyright: ignore

    _running.append(gpu)
    try:
        with (
            mock.patch.multiple(torch.cuda, **cuda_api.replacements(gpu)),
            mock.patch.object(torch, "Generator", cuda_api.Generator),
            mock.patch.object(threading.Thread, "run", new_thread),
            mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
            mock.patch.object(torch.nn.Module, "_apply", keeps_ties(torch.nn.Module._apply)),
            kernels.launched_on(gpu),
            collectives.by_gloo(),
            gpu.modes(),
        ):
            yield gpu
    finally:
        _running.remove(gpu)
