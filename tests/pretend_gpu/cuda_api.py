"""`torch.cuda` of the pretend GPU: one H200 with a stream that is as far as the host let it be."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from pretend_gpu.tensor import CUDA

PROPERTIES = SimpleNamespace(
    name="pretend GPU",
    major=9,
    minor=0,
    total_memory=150_000_000_000,
    multi_processor_count=4,  # programs of a persistent kernel; the interpreter runs them in turn
    shared_memory_per_block_optin=232_448,
    L2_cache_size=60 * 2**20,
    warp_size=32,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
)


class Generator(torch._C.Generator):
    """Of the host, or of the device with numbers of its own."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            _ON_DEVICE[made._cdata] = made  # pyright: ignore[reportAttributeAccessIssue]
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return device_of(self)


# By the address of the generator in PyTorch's core, which hands operations another Python object.
# Held, so that no other generator gets the address.
_ON_DEVICE: dict[int, Generator] = {}


def device_of(generator: torch._C.Generator) -> torch.device:
    address = generator._cdata  # pyright: ignore[reportAttributeAccessIssue]
    return CUDA if address in _ON_DEVICE else torch.device("cpu")


class DeviceContext(contextlib.nullcontext):
    """`torch.cuda.device(0)`."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        if device is not None and not isinstance(device, int):
            if torch.device(device).type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")


def replacements(gpu: Any) -> dict[str, Any]:
    """name -> what stands in `torch.cuda` for it."""

    class Event:
        """Has happened once the host has waited for the device, or else at the second query."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.record()

        def record(self, stream: Any = None) -> None:
            self.queries, self.waits_before = 0, len(gpu.waits)

        def query(self) -> bool:
            self.queries += 1
            has_happened = self.queries > 1 or len(gpu.waits) > self.waits_before
            if has_happened:
                gpu.finish_downloads()
            return has_happened

        def synchronize(self) -> None:
            gpu.wait("Event.synchronize")

        def wait(self, stream: Any = None) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    class Stream:
        cuda_stream, device = 0, CUDA

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

        def wait_stream(self, stream: Any) -> None:
            pass

        def wait_event(self, event: Any) -> None:
            pass

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

    def set_state(state: torch.Tensor, device: Any = "cuda") -> None:
        gpu.random_state = state.clone()

    def set_states(states: list[torch.Tensor]) -> None:
        set_state(states[0])

    def seed(number: int) -> None:
        gpu.random_state = torch._C.Generator().manual_seed(number).get_state()

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def gives(value: Any) -> Any:
        return lambda *args, **kwargs: value

    return {
        "is_available": gives(True),
        "is_initialized": gives(True),
        "_is_compiled": gives(True),
        "_initialized": True,
        "init": nothing,
        "_lazy_init": nothing,
        "_lazy_call": lambda call, **kwargs: call(),
        "device_count": gives(1),
        "current_device": gives(0),
        "set_device": nothing,
        "device": DeviceContext,
        "get_device_properties": gives(PROPERTIES),
        "get_device_capability": gives((9, 0)),
        "get_device_name": gives(PROPERTIES.name),
        "is_bf16_supported": gives(True),
        "synchronize": lambda device=None: gpu.wait("cuda.synchronize"),
        "set_sync_debug_mode": gpu.waits.set_debug_mode,
        "empty_cache": nothing,
        "memory_allocated": gives(0),
        "max_memory_allocated": gives(0),
        "memory_reserved": gives(0),
        "mem_get_info": gives((140 * 2**30, 141 * 2**30)),
        "reset_peak_memory_stats": nothing,
        "get_rng_state": lambda device="cuda": gpu.random_state.clone(),
        "get_rng_state_all": lambda: [gpu.random_state.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": set_states,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "is_current_stream_capturing": gives(False),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": gives(contextlib.nullcontext()),
        "Event": Event,
        "Stream": Stream,
    }
