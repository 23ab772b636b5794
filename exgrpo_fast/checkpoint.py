"""Checkpoints: a plain Hugging Face folder beside the trainer's state, committed by one rename.

    step_12/MANIFEST.json   sizes and xxh3-128 of every file; written last
    step_12/hf/             model.safetensors, config.json, tokenizer: loads anywhere
    step_12/adapter/        with model.lora: the adapter in peft's format; hf/ has it merged
    step_12/state/          trainer.json + tensors.safetensors: optimiser, replay, cursors

Nothing is pickled. A folder counts as a checkpoint only when its manifest verifies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exgrpo_fast.errors import UserError

MANIFEST = "MANIFEST.json"
SCHEMA = 1


class CheckpointError(UserError):
    """A checkpoint that cannot be used, as one line naming the file."""


class CannotSave(Exception):
    """The disk refused a checkpoint; those already there are untouched."""


class Checkpoints:
    """The `checkpoints/` folder of a run: save, find, verify, load, keep the newest."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, save_model: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
        """The folder of the new checkpoint. CannotSave when the disk refuses."""
        try:
            return self._save(step, save_model, state)
        except (OSError, SafetensorError) as error:
            raise CannotSave(f"checkpoint of step {step} in {self.folder}: {error}") from error

    def _save(
        self, step: int, save_model: Callable[[Path], None], state: Mapping[str, Any]
    ) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".tmp-*"):  # of a run that died here
            shutil.rmtree(leftover)
        final = self.folder / f"step_{step}"
        write_checkpoint(final, step, save_model, state)
        for old in self.steps()[: -self.keep]:
            _discard(self.folder / f"step_{old}")
        return final

    def steps(self) -> list[int]:
        """Steps with a checkpoint folder, oldest first."""
        names = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def newest_valid(self, on_bad: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that verifies; `on_bad` hears why newer ones were passed over."""
        for step in reversed(self.steps()):
            path = self.folder / f"step_{step}"
            try:
                verify(path)
            except CheckpointError as error:
                on_bad(str(error))
            else:
                return path
        return None


def write_checkpoint(
    final: Path, step: int, save_model: Callable[[Path], None], state: Mapping[str, Any]
) -> None:
    """Write everything beside its final name, make it durable, then rename.

    OSError or SafetensorError when the disk refuses.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a writer that died here
    (temporary / "state").mkdir(parents=True)
    save_model(temporary / "hf")
    plain, tensors = split_tensors(state)
    (temporary / "state" / "trainer.json").write_text(json.dumps(plain))
    save_file(tensors, temporary / "state" / "tensors.safetensors")
    _write_manifest(temporary, step)
    if final.exists():
        _discard(final)
    os.rename(temporary, final)
    _sync(final.parent)


def load_state(path: Path, *, only: Collection[str] = ()) -> dict[str, Any]:
    """The trainer's state of one verified checkpoint; `only` names the entries to read, the
    others (the optimiser's are the large ones) then stay on the disk."""
    plain = json.loads((path / "state" / "trainer.json").read_text())
    if only:
        plain = {name: plain[name] for name in only}
    with safe_open(path / "state" / "tensors.safetensors", framework="pt") as file:
        wanted = [name for name in file.keys() if name.split(".")[1] in plain]
        return merge_tensors(plain, {name: file.get_tensor(name) for name in wanted})


def find_checkpoint(path: Path, on_bad: Callable[[str], None]) -> Path:
    """`path` itself, or of a run folder the newest that verifies; CheckpointError else."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        if not (path / MANIFEST).exists():
            raise CheckpointError(f"{path}: neither a run folder nor a checkpoint")
        verify(path)
        return path
    newest = Checkpoints(folder).newest_valid(on_bad)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint that verifies")
    return newest


# --- integrity ------------------------------------------------------------------------------------


def verify(path: Path) -> None:
    """CheckpointError naming the first file that is missing, unlisted or changed."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = {
            name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST}: missing or unreadable") from None
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path / MANIFEST}: schema {manifest.get('schema')}, this version reads {SCHEMA}"
        )
    if manifest.get("digest") != _digest_of_listing(manifest["files"]):
        raise CheckpointError(f"{path / MANIFEST}: the listing was changed")
    present = {str(file.relative_to(path)): file for file in _files(path)}
    for name in sorted(listed.keys() | present.keys()):
        if name not in present:
            raise CheckpointError(f"{path / name}: missing")
        if name not in listed:
            raise CheckpointError(f"{path / name}: not in the manifest")
        if (present[name].stat().st_size, _digest(present[name])) != tuple(listed[name]):
            raise CheckpointError(f"{path / name}: damaged (size or checksum differs)")


def _write_manifest(path: Path, step: int) -> None:
    files = {}
    for file in sorted(_files(path)):
        _sync(file)
        entry = {"bytes": file.stat().st_size, "xxh3_128": _digest(file)}
        files[str(file.relative_to(path))] = entry
    manifest = {"schema": SCHEMA, "step": step, "files": files, "digest": _digest_of_listing(files)}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(path / MANIFEST)
    for folder in (*(entry for entry in path.iterdir() if entry.is_dir()), path):
        _sync(folder)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)


def _digest(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _digest_of_listing(files: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _sync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Rename first: a half-deleted folder must not look like a checkpoint."""
    trash = path.with_name(f".tmp-trash-{path.name}")
    os.rename(path, trash)
    shutil.rmtree(trash)


# --- nested state <-> JSON + tensors --------------------------------------------------------------


def split_tensors(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Replace every tensor of a nested state by its name; the tensors come back flat."""
    if isinstance(state, Tensor):
        return {"__tensor__": name}, {name: state.detach().cpu().contiguous().clone()}
    if isinstance(state, Mapping):
        pairs = {str(k): split_tensors(v, f"{name}.{k}") for k, v in state.items()}
        tensors = {n: t for _, found in pairs.values() for n, t in found.items()}
        return {k: plain for k, (plain, _) in pairs.items()}, tensors
    return state, {}


def merge_tensors(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, dict):
        if plain.keys() == {"__tensor__"}:
            return tensors[plain["__tensor__"]]
        return {k: merge_tensors(v, tensors) for k, v in plain.items()}
    return plain
