"""`model.name` -> a folder that transformers loads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from exgrpo_fast.build.pretrained import smollm2
from exgrpo_fast.build.pretrained.cache import cache_root, fill_once, is_whole
from exgrpo_fast.core.text import clean_line, first_line
from exgrpo_fast.model.folder_reading import PolicyError, quiet_libraries
from exgrpo_fast.model.gguf_file import find_gguf, read_usable_header
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.display.live import make_screen


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
        folder = fill_once(smollm2.folder(), lambda out: _make_smollm2(out, screen), screen)
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


def _make_smollm2(out: Path, screen: Screen) -> None:
    work = out / "download"
    work.mkdir()
    file = smollm2.fetch(work, screen)
    with screen.phase("convert GGUF"):
        convert_gguf(file, out, key=f"model.name {smollm2.NAME}")
    shutil.rmtree(work)


def converted(file: Path) -> Path:
    """Where the weights of this file belong: by its content, so that a new file is a new folder."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, xxhash.xxh3_64)
    except OSError as error:
        raise PolicyError(f"model.name {file}: {error.strerror}") from None
    return cache_root() / "gguf" / f"{file.stem}-{digest.hexdigest()}"


def convert_gguf(file: Path, out: Path, *, key: str) -> None:
    """Write config, weights, tokenizer and chat template of `file` into the folder `out`.

    By transformers' own reader, every weight dequantised. PolicyError, one line that begins with
    `key`, where the file is damaged, no GGUF, or of an architecture that transformers cannot map.
    """
    read_usable_header(file, key)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # The reader's progress bar heeds no setting of transformers.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                trust_remote_code=False,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        model, loading = loaded
    except Exception as error:  # a damaged file makes three libraries stumble, each its way
        why = clean_line(first_line(error), max_line=200)
        raise PolicyError(
            f"{key}: {file.name} is damaged, or transformers cannot map it: {why}"
        ) from None
    # A tensor that is not in the file would keep its random initial values.
    missing = sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])})
    if missing:
        raise PolicyError(f"{key}: {file.name} lacks {len(missing)} weights, such as {missing[0]}")
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise PolicyError(f"{key}: {out}: {clean_line(error, max_line=200)}") from None
