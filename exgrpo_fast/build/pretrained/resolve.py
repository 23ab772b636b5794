"""`model.name` -> a folder that transformers loads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import xxhash

from exgrpo_fast.build.pretrained import smollm2
from exgrpo_fast.build.pretrained.cache import cache_root, fill_once, is_whole
from exgrpo_fast.build.pretrained.gguf import convert_gguf
from exgrpo_fast.model.folder_reading import PolicyError, quiet_libraries
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.display.live import make_screen

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def fetch_model(name: str) -> str:
    """`model_folder` outside a run; what it says goes to stderr."""
    quiet_libraries()
    screen = make_screen(sys.stderr)
    try:
        return model_folder(name, screen)
    finally:
        screen.close()


def model_folder(name: str, screen: Screen) -> str:
    """A GGUF file or `smollm2` -> the folder of its dequantised weights; other names as they are.

    Conversion happens once a machine, into the cache. PolicyError in one line where it cannot.
    """
    if name == smollm2.NAME:
        folder = fill_once(smollm2.folder(), lambda out: smollm2.make(out, screen), screen)
        screen.note(f"model.name {name}: {smollm2.TITLE}, dequantised from GGUF, in {folder}")
        return str(folder)
    file = find_gguf(name)
    if file is None:
        return name

    def make(out: Path) -> None:
        with screen.phase("convert GGUF"):
            convert_gguf(file, out, key=f"model.name {name}")

    folder = fill_once(converted(file), make, screen)
    screen.note(f"model.name {name}: dequantised from GGUF to float32, in {folder}")
    return str(folder)


def cached_folder(name: str) -> str | None:
    """The same without making anything: None where it is not in the cache yet."""
    file = None if name == smollm2.NAME else find_gguf(name)
    if name != smollm2.NAME and file is None:
        return name
    folder = smollm2.folder() if file is None else converted(file)
    return str(folder) if is_whole(folder) else None


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


def converted(file: Path) -> Path:
    """Where the weights of this file belong: by its content, so that a new file is a new folder."""
    digest = xxhash.xxh3_64()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise PolicyError(f"model.name {file}: {error.strerror}") from None
    return cache_root() / "gguf" / f"{file.stem}-{digest.hexdigest()}"
