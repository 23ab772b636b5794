"""A GGUF file, as llama.cpp uses them: which one a name means, and its header. Loads no torch.

The layout is that of ggml's docs/gguf.md: magic, version, two counts, settings, tensors, then their
data, which begins at a multiple of `general.alignment`.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from packaging.version import Version
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from exgrpo_fast.model.folder_reading import PolicyError
from exgrpo_fast.model.folder_settings import Positions

READS_MERGES = Version("5.18")  # before, transformers fails on the tokenizer of a GGUF file
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_VERSIONS = (2, 3)
# Types of settings by their number: of struct, but for two.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# transformers takes an architecture with one of these in its name for one that it maps.
_PARTS = ("llama", "t5")


def find_gguf(name: str) -> Path | None:
    """The file itself, or the only one of a folder without safetensors; None for other names."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise PolicyError(f"model.name {name}: no such file")
    elif path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if not files:
            return None
        if len(files) > 1 and not _SHARD.search(files[0].name):
            listed = ", ".join(file.name for file in files)
            raise PolicyError(
                f"model.name {name}: holds {len(files)} GGUF files, name one: {listed}"
            )
        path = files[0]
    else:
        return None
    if _SHARD.search(path.name):
        raise PolicyError(
            f"model.name {name}: {path.name} is a shard, which transformers does not read; "
            "`llama-gguf-split --merge` makes one file of all"
        )
    return path


def read_usable_header(file: Path, subject: str) -> Header | None:
    """As `read_header`. PolicyError for what is no GGUF file, for one that is cut, and for an
    architecture that transformers cannot map."""
    if importlib.util.find_spec("gguf") is None:
        raise PolicyError(f"{subject}: GGUF files need: pip install 'exgrpo-fast[train]' (gguf)")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PolicyError(
                f"{subject}: {file.name} is no GGUF file (it does not begin with 'GGUF')"
            )
    if Version(transformers.__version__) < READS_MERGES:
        raise PolicyError(
            f"{subject}: GGUF files need transformers {READS_MERGES} or newer, here is "
            f"{transformers.__version__}"
        )
    try:
        header = read_header(file)
    except (struct.error, UnicodeDecodeError, KeyError):
        raise PolicyError(f"{subject}: {file.name} is damaged: its header cannot be read") from None
    if header is None:
        return None
    if header.num_bytes > file.stat().st_size:
        raise PolicyError(
            f"{subject}: {file.name} is damaged: {file.stat().st_size} bytes of {header.num_bytes}"
        )
    kind = header.settings.get("general.architecture")
    if isinstance(kind, str) and not _is_mapped(kind):
        raise PolicyError(
            f"{subject}: transformers {transformers.__version__} maps no GGUF file of architecture "
            f"{kind}"
        )
    return header


def _is_mapped(architecture: str) -> bool:
    known = {_letters(name) for name in GGUF_CONFIG_MAPPING}
    return _letters(architecture) in known or any(part in architecture for part in _PARTS)


def _letters(name: str) -> str:
    return re.sub("[-_]", "", name)


class Header(NamedTuple):
    settings: dict[str, Any]  # those that are no arrays
    num_bytes: int  # of the whole file, without padding behind the last tensor

    @property
    def chat_template(self) -> str | None:
        return self.settings.get("tokenizer.chat_template")

    @property
    def positions(self) -> Positions | None:
        """As those of the config that transformers makes of the file."""
        most = self.settings.get(f"{self.settings.get('general.architecture')}.context_length")
        is_rotary = any(".rope." in name for name in self.settings)
        why = "max_position_embeddings"
        return Positions(most, why, is_rotary, binds=not is_rotary) if most else None


def read_header(file: Path) -> Header | None:
    """None for a version that is not read here. struct.error where the file ends too early."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, at=4)
        if reader.number("I") not in _VERSIONS:
            return None
        num_tensors, num_settings = reader.number("Q"), reader.number("Q")
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            name = reader.string()
            settings[name] = reader.value(reader.number("I"))
        ends = [reader.tensor_end() for _ in range(num_tensors)]
        alignment = settings.get("general.alignment", 32)
        begin = -(-reader.at // alignment) * alignment
        return Header(settings, begin + max(ends, default=0))


class _Reader:
    """Little-endian values, one behind the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        (text,) = struct.unpack_from(f"{self.number('Q')}s", self.data, self.at)
        self.at += len(text)
        return text.decode()

    def value(self, kind: int) -> Any:
        """Arrays are passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_FORMATS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _FORMATS:
            self.at += count * struct.calcsize(f"<{_FORMATS[inner]}")
            return None
        for _ in range(count):
            self.value(inner)
        return None

    def tensor_end(self) -> int:
        """Of the next tensor in the list: bytes behind the begin of the data."""
        gguf: Any = importlib.import_module("gguf")  # an optional package
        self.string()
        count = 1
        for _ in range(self.number("I")):
            count *= self.number("Q")
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.number("I"))]
        return self.number("Q") + count // block * block_bytes
