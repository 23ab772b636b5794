"""Committed whole or not at all; every kind of damage is found and its file named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints, load_state
from exgrpo_fast.run.checkpoint.manifest import MANIFEST, CheckpointError, verify

STATE = {
    "num_steps": 7,
    "stream": {"epoch": 2, "waiting": ["a.b", "c"], "nothing": {}},
    "rng": {"state": 2**127 + 1, "buffered": 0.1},
    "optimiser": {
        "moments": {
            "0": {"exp_avg": torch.tensor([[1.5, -0.0], [float("nan"), 3e-45]]), "step": 3.0},
            "1": {"exp_avg": torch.tensor([1, -2], dtype=torch.int32), "empty": torch.empty(0)},
        }
    },
    "flag": True,
    "none": None,
}


def save_model(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (path / "config.json").write_text('{"model_type": "qwen3"}')


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    origin = {"config": "abc", "packages": {"torch": "9"}}
    return Checkpoints(tmp_path / "checkpoints", keep=3, origin=origin)


@pytest.fixture
def saved(checkpoints: Checkpoints) -> Path:
    return checkpoints.save(7, save_model, STATE)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        same_bits = a.numpy().tobytes() == b.numpy().tobytes()
        return a.dtype == b.dtype and a.shape == b.shape and same_bits
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b and type(a) is type(b)


def test_a_nested_state_comes_back_bit_for_bit(saved: Path) -> None:
    assert same(load_state(saved), STATE)


def test_what_lies_in_a_checkpoint(saved: Path) -> None:
    files = {str(f.relative_to(saved)): f for f in saved.rglob("*") if f.is_file()}
    assert files.keys() == {
        MANIFEST,
        "hf/model.safetensors",
        "hf/config.json",
        "state/trainer.json",
        "state/tensors.safetensors",
    }
    manifest = json.loads(files.pop(MANIFEST).read_text())
    assert {n: e["bytes"] for n, e in manifest["files"].items()} == {
        name: file.stat().st_size for name, file in files.items()
    }
    assert (manifest["schema"], manifest["step"]) == (2, 7)
    assert manifest["origin"] == {"config": "abc", "packages": {"torch": "9"}}
    verify(saved)


def test_nothing_is_pickled(saved: Path) -> None:
    for file in saved.rglob("*"):
        if file.is_file():
            start = file.read_bytes()[:16]
            assert file.suffix in {".json", ".safetensors"}
            assert not start.startswith((b"\x80", b"PK")), f"{file} looks like a pickle or a zip"


# --- damage ---------------------------------------------------------------------------------------


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, append, Path.unlink])
@pytest.mark.parametrize(
    "name", ["hf/model.safetensors", "hf/config.json", "state/trainer.json", MANIFEST]
)
def test_a_damaged_file_is_named(saved: Path, damage, name: str) -> None:
    damage(saved / name)
    with pytest.raises(CheckpointError, match=str(saved / name)):
        verify(saved)


def test_of_large_files_the_size_alone_can_be_compared(saved: Path) -> None:
    file = saved / "hf" / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        verify(saved, largest_read=size)
    verify(saved, largest_read=size - 1)
    file.write_bytes(bytes(size - 1))
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        verify(saved, largest_read=0)


@pytest.mark.parametrize("name", ["extra", "hf/model-00002.safetensors", f"hf/{MANIFEST}"])
def test_a_file_too_many_is_named(saved: Path, name: str) -> None:
    (saved / name).write_text("x")
    with pytest.raises(CheckpointError, match=f"{name}: not in the manifest"):
        verify(saved)


def test_files_that_changed_places_are_named(saved: Path) -> None:
    model, config = saved / "hf/model.safetensors", saved / "hf/config.json"
    model.rename(saved / "third")
    config.rename(model)
    (saved / "third").rename(config)
    with pytest.raises(CheckpointError, match="config.json: damaged"):
        verify(saved)


def test_a_manifest_that_was_made_to_fit_is_found(saved: Path) -> None:
    """Somebody drops a file and its entry: the digest of the listing no longer matches."""
    (saved / "hf/config.json").unlink()
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["files"]["hf/config.json"]
    (saved / MANIFEST).write_text(json.dumps(manifest, indent=1))
    with pytest.raises(CheckpointError, match="MANIFEST.json: was changed"):
        verify(saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 7', '"step": 8'), ('"step": 7', '"step":  7'), ("abc", "abd"), ("}", "}\n")],
)
def test_any_edit_of_the_manifest_is_found(saved: Path, old: str, new: str) -> None:
    text = (saved / MANIFEST).read_text()
    assert old in text
    (saved / MANIFEST).write_text(new.join(text.rsplit(old, 1)))
    with pytest.raises(CheckpointError, match="MANIFEST.json: was changed"):
        verify(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 1}', "null", "\xff"])
def test_a_manifest_of_another_kind_is_unreadable(saved: Path, text: str) -> None:
    (saved / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="missing or unreadable"):
        verify(saved)


def test_a_later_schema_is_named(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text()) | {"schema": 3}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="schema 3, this version reads 2"):
        verify(saved)


# --- the folder of checkpoints --------------------------------------------------------------------


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 9, 10, 11):
        checkpoints.save(step, save_model, STATE)
    assert checkpoints.steps() == [9, 10, 11]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_10", "step_11", "step_9"]


def test_newest_valid_walks_back_over_the_damaged(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        checkpoints.save(step, save_model, STATE)
    flip_bit(checkpoints.folder / "step_3" / "hf" / "model.safetensors")
    shutil.rmtree(checkpoints.folder / "step_2" / "state")
    heard: list[str] = []
    assert checkpoints.newest_valid(heard.append) == checkpoints.folder / "step_1"
    assert [("step_3" in why, "step_2" in why) for why in heard] == [(True, False), (False, True)]
    flip_bit(checkpoints.folder / "step_1" / "hf" / "config.json")
    assert checkpoints.newest_valid(heard.append) is None


def test_a_run_that_died_while_saving_left_no_checkpoint(checkpoints: Checkpoints) -> None:
    class Died(BaseException):
        pass

    def die(path: Path) -> None:
        save_model(path)
        raise Died

    with pytest.raises(Died):
        checkpoints.save(1, die, STATE)
    assert checkpoints.steps() == [] and list(checkpoints.folder.iterdir()) != []
    checkpoints.save(2, save_model, STATE)  # which clears up after it
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step_2"]


def test_no_step_name_before_the_manifest_is_written(checkpoints: Checkpoints) -> None:
    def look(path: Path) -> None:
        save_model(path)
        assert checkpoints.steps() == [] and path.parent.name == ".tmp-step_4"

    assert checkpoints.save(4, look, STATE).name == "step_4"


def test_the_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    checkpoints.save(5, save_model, STATE)
    path = checkpoints.save(5, save_model, STATE | {"num_steps": 8})
    verify(path)
    assert load_state(path)["num_steps"] == 8
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step_5"]


def test_a_full_disk_is_said_and_costs_no_older_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.save(1, save_model, STATE)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotSave, match="checkpoint of step 2 .*No space left on device"):
        checkpoints.save(2, full, STATE)
    assert checkpoints.newest_valid(pytest.fail) == checkpoints.folder / "step_1"


def test_on_a_full_disk_the_newest_stays_and_the_others_make_room(
    checkpoints: Checkpoints, monkeypatch
) -> None:
    for step in (1, 2, 3):
        checkpoints.save(step, save_model, STATE)
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    tries: list[list[int]] = []

    def full_once(path: Path) -> None:
        tries.append(checkpoints.steps())
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        save_model(path)

    checkpoints.save(4, full_once, STATE)
    assert tries == [[1, 2, 3], [3]]
    assert checkpoints.steps() == [3, 4]
    disk.free = 1 << 40  # refused for another reason: nobody leaves
    tries.clear()
    with pytest.raises(CannotSave):
        checkpoints.save(5, full_once, STATE)
    assert checkpoints.steps() == [3, 4]
    assert not list(checkpoints.folder.glob(".tmp-*"))


def test_every_file_and_folder_is_synced_before_the_rename(
    checkpoints: Checkpoints, monkeypatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(old, new) -> None:
        calls.append(("rename", str(new)))
        rename(old, new)

    def nested(path: Path) -> None:
        save_model(path)
        (path / "deep" / "er").mkdir(parents=True)
        (path / "deep" / "er" / "x.json").write_text("{}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    final = checkpoints.save(6, nested, STATE)
    temporary = final.with_name(".tmp-step_6")
    before = {path for kind, path in calls[: calls.index(("rename", str(final)))]}
    written = {str(temporary / path.relative_to(final)) for path in final.rglob("*")}
    assert {*written, str(temporary)} <= before
    assert calls[-1] == ("fsync", str(final.parent))


def test_later_checkpoints_are_set_aside_and_not_lost(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        checkpoints.save(step, save_model, STATE)
    assert checkpoints.set_aside_after(1) == ["set-aside-step_2", "set-aside-step_3"]
    assert checkpoints.steps() == [1]
    verify(checkpoints.folder / "set-aside-step_3")
