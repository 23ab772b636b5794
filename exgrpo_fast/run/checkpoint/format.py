"""Checkpoints: a plain Hugging Face folder beside the trainer's state, committed by one rename.

    step_12/MANIFEST.json   sizes and xxh3-128 of every file, and where they come from; written last
    step_12/hf/             model.safetensors, config.json, tokenizer: loads anywhere
    step_12/adapter/        with model.lora: the adapter in peft's format; hf/ has it merged
    step_12/state/          trainer.json + tensors.safetensors: optimiser, replay, cursors
    step_12/state/parts/    with several ranks: the optimiser's moments, each rank's shards

The files hold no pickle. A folder counts as a checkpoint only when its manifest verifies.
`writer.py` writes them in the background.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exgrpo_fast.run.checkpoint.manifest import folder_bytes, newest_valid, write_manifest
from exgrpo_fast.run.directory import checkpoint_steps, sync

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PARTS = Path("state/parts")

WriteFolder = Callable[[Path], None]  # makes the folder and its files
State = Mapping[str, Any]  # nested; its leaves are plain JSON or tensors

log = logging.getLogger(__name__)


class CannotSave(Exception):
    """The disk refused a checkpoint; those already there are untouched."""


class Checkpoints:
    """The `checkpoints/` folder of a run: save, find, verify, load, keep the newest."""

    def __init__(
        self, folder: Path, *, keep: int = 2, origin: Mapping[str, Any] | None = None
    ) -> None:
        """`origin`: what the manifests say about where a checkpoint comes from (plain JSON)."""
        self.folder = folder
        self.keep = keep
        self.origin = origin or {}

    def save(
        self,
        step: int,
        save_model: WriteFolder,
        state: State,
        *,
        save_parts: WriteFolder | None = None,
    ) -> Path:
        """The folder of the new checkpoint. CannotSave when the disk refuses.

        `save_model` writes hf/, `save_parts` state/parts/: what `state` names and does not hold.
        """
        final = self.folder / f"step_{step}"
        write = partial(write_checkpoint, final, step, save_model, state, self.origin, save_parts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clear_leftovers()
            try:
                write()
            except (OSError, SafetensorError):
                if not self._make_room():
                    raise
                write()
            for old in self.steps()[: -self.keep]:
                _discard(self.folder / f"step_{old}")
        except (OSError, SafetensorError) as error:
            raise CannotSave(f"checkpoint of step {step} in {self.folder}: {error}") from error
        return final

    def _make_room(self) -> bool:
        """On a full disk only the newest checkpoint stays, if it is whole. True: room was made."""
        newest = self.newest_valid(lambda why: None)
        if newest is None or shutil.disk_usage(self.folder).free > folder_bytes(newest):
            return False
        older = [path for s in self.steps() if (path := self.folder / f"step_{s}") != newest]
        for path in older:
            log.warning("%s is deleted, to make room on a full disk", path)
            _discard(path)
        return bool(older)

    def clear_leftovers(self) -> None:
        """Remove what a process that died had not finished writing, or deleting."""
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Steps with a checkpoint folder, oldest first."""
        return checkpoint_steps(self.folder)

    def set_aside_after(self, step: int) -> list[str]:
        """Rename checkpoints later than `step`, from which a run resumes; their new names.

        They belong to steps that will be done again, or are damaged; nothing is deleted.
        """
        names = []
        for later in (s for s in self.steps() if s > step):
            aside = self.folder / f"set-aside-step_{later}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self.folder / f"step_{later}", aside)
            names.append(aside.name)
        return names

    def newest_valid(self, on_bad: Callable[[str], None]) -> Path | None:
        """As of `manifest.newest_valid`."""
        return newest_valid(self.folder, on_bad)


def write_checkpoint(
    final: Path,
    step: int,
    save_model: WriteFolder,
    state: State,
    origin: Mapping[str, Any] | None = None,
    save_parts: WriteFolder | None = None,
) -> None:
    """Write everything beside its final name, make it durable, then rename.

    OSError or SafetensorError when the disk refuses.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a writer that died here
    try:
        (temporary / "state").mkdir(parents=True)
        save_model(temporary / "hf")
        plain, tensors = split_tensors(state)
        (temporary / "state" / "trainer.json").write_text(json.dumps(plain))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary / "state" / "tensors.safetensors")
        if save_parts is not None:
            save_parts(temporary / PARTS)
        write_manifest(temporary, step, origin or {})
        if final.exists():
            _discard(final)
        os.rename(temporary, final)
    except (OSError, SafetensorError):  # half a checkpoint makes a full disk no emptier
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)


def load_state(
    path: Path, *, only: Collection[str] = (), mesh: DeviceMesh | None = None
) -> dict[str, Any]:
    """The trainer's state of one verified checkpoint; `only` names the entries to read, the
    others (the optimiser's are the large ones) then stay on the disk.

    Sharded tensors come gathered, or sharded over `mesh`.
    """
    plain = json.loads((path / "state" / "trainer.json").read_text())
    if only:
        plain = {name: plain[name] for name in only}
    wanted = set(tensor_names(plain))
    with safe_open(path / "state" / "tensors.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in wanted & set(file.keys())}
    if sharded := wanted - tensors.keys():
        # A second of imports, of which few have need
        from exgrpo_fast.core.dtensor import read_shards

        tensors |= read_shards(path / PARTS, sharded, mesh)
    return merge_tensors(plain, tensors)


def _discard(path: Path) -> None:
    """Rename first: a half-deleted folder must not look like a checkpoint."""
    trash = path.with_name(f".tmp-trash-{path.name}")
    os.rename(path, trash)
    shutil.rmtree(trash)


# --- nested state <-> JSON + tensors --------------------------------------------------------------


def split_tensors(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Replace every tensor of a nested state by its name; the tensors come back flat."""
    if isinstance(state, Tensor):
        return {"__tensor__": name}, {name: state.detach()}
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


def tensor_names(plain: Any) -> Iterator[str]:
    """The names of the tensors that `plain` refers to."""
    if isinstance(plain, dict):
        if plain.keys() == {"__tensor__"}:
            yield plain["__tensor__"]
        else:
            for value in plain.values():
                yield from tensor_names(value)
