"""The manifest of a checkpoint: sizes and digests of its files, and whether they are still so.

Loads no torch: a damaged checkpoint is refused before that takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.directory import checkpoint_steps, sync

MANIFEST = "MANIFEST.json"
SCHEMA = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be used; one line that names the file."""


def find_checkpoint(path: Path, on_bad: Callable[[str], None]) -> Path:
    """`path` itself, or of a run folder the newest that verifies; CheckpointError else."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        if not (path / MANIFEST).exists():
            raise CheckpointError(f"{path}: neither a run folder nor a checkpoint")
        verify(path)
        return path
    newest = newest_valid(folder, on_bad)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint that verifies")
    return newest


def newest_valid(folder: Path, on_bad: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a `checkpoints/` folder that verifies; `on_bad` is called with the reason
    for each newer one that was skipped."""
    for step in reversed(checkpoint_steps(folder)):
        path = folder / f"step_{step}"
        try:
            verify(path)
        except CheckpointError as error:
            on_bad(str(error))
        else:
            return path
    return None


def verify(path: Path, *, largest_read: float = float("inf")) -> None:
    """CheckpointError naming the first file that is missing, unlisted or changed.

    `largest_read`: bytes; of a larger file the size alone is compared.
    """
    manifest = read_manifest(path)
    listed = manifest["files"]
    present = {str(file.relative_to(path)): file for file in _files(path)}
    for name in sorted(listed.keys() | present.keys()):
        if name not in present:
            raise CheckpointError(f"{path / name}: missing")
        if name not in listed:
            raise CheckpointError(f"{path / name}: not in the manifest")
        size, digest = listed[name]["bytes"], listed[name]["xxh3_128"]
        found = present[name].stat().st_size
        if found != size or (size <= largest_read and _digest(present[name]) != digest):
            raise CheckpointError(f"{path / name}: damaged (size or checksum differs)")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, exactly as it was written; CheckpointError else."""
    file = path / MANIFEST
    try:
        text = file.read_text()
        manifest = json.loads(text)
        manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: missing or unreadable") from None
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file}: schema {manifest.get('schema')}, this version reads {SCHEMA}"
        )
    # The text itself, too: a changed blank or a second key of one name is not seen in the values.
    if manifest.get("digest") != _manifest_digest(manifest) or text != _manifest_text(manifest):
        raise CheckpointError(f"{file}: was changed")
    return manifest


def write_manifest(path: Path, step: int, origin: Mapping[str, Any]) -> None:
    files = {}
    for file in sorted(_files(path)):
        sync(file)
        entry = {"bytes": file.stat().st_size, "xxh3_128": _digest(file)}
        files[str(file.relative_to(path))] = entry
    manifest = {"schema": SCHEMA, "step": step, "origin": dict(origin), "files": files}
    manifest["digest"] = _manifest_digest(manifest)
    (path / MANIFEST).write_text(_manifest_text(manifest))
    sync(path / MANIFEST)
    for folder in [*(inner for inner in path.rglob("*") if inner.is_dir()), path]:
        sync(folder)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)


def folder_bytes(path: Path) -> int:
    """Bytes of a checkpoint's files on the disk, without the manifest."""
    return sum(file.stat().st_size for file in _files(path))


def _digest(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    signed = {name: value for name, value in manifest.items() if name != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(signed, sort_keys=True).encode())


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)
