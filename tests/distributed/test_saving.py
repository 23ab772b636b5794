"""Checkpoints whose shards several ranks write: read by any number of ranks, and when a rank cannot write.

The ranks send no pickle while they save: `saving_worker.py` refuses them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parted_state import CURSOR, MOMENTS, WEIGHT
from safetensors import safe_open
from safetensors.torch import load_file
from several_processes import run_processes

from exgrpo_fast.run.checkpoint.format import load_state
from exgrpo_fast.run.checkpoint.manifest import CheckpointError, verify

WORKER = Path(__file__).with_name("saving_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step_1, by three processes."""
    path = tmp_path_factory.mktemp("checkpoints")
    said = run_processes(3, WORKER, str(path), "write")
    found = {"committed": 1, "told": [1, 1], "reused": True, "steps": [1]}
    assert [w["written"] for w in said] == [found | {"copied": copied} for copied in (1, 0, 0)]
    return path


def test_each_process_writes_its_part_and_no_other(folder: Path) -> None:
    verify(folder / "step_1")
    parts = sorted((folder / "step_1" / "state" / "parts").iterdir())
    assert len(parts) == 3 * 2 and all(part.suffix == ".safetensors" for part in parts)
    for name, first, rows in (("wide", 0, [3, 3, 1]), ("half", 1, [2, 2, 1])):
        own = [load_file(part)[f"state.learner.moments.{name}"] for part in parts[first::2]]
        assert [len(part) for part in own] == rows
        assert torch.equal(torch.cat(own), MOMENTS[name])
    with safe_open(folder / "step_1" / "state" / "tensors.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["state.cursor"]
    weights = load_file(folder / "step_1" / "hf" / "model.safetensors")
    assert torch.equal(weights["weight"], WEIGHT)


def test_one_process_reads_what_three_wrote(folder: Path) -> None:
    state = load_state(folder / "step_1")
    found = state["learner"]["moments"]
    assert found.keys() == MOMENTS.keys() and torch.equal(state["cursor"], CURSOR)
    for name, moment in MOMENTS.items():
        assert found[name].dtype == moment.dtype and torch.equal(found[name], moment), name
    assert load_state(folder / "step_1", only=("cursor",)).keys() == {"cursor"}


@pytest.mark.parametrize("count", [2, 4])
def test_other_numbers_of_processes_read_what_three_wrote(folder: Path, count: int) -> None:
    for rank, said in enumerate(run_processes(count, WORKER, str(folder), "read")):
        assert said["cursor"] == CURSOR.tolist()
        for name, moment in MOMENTS.items():
            parts = torch.chunk(moment, count)
            own = parts[rank].tolist() if rank < len(parts) else []
            assert said["parts"][name] == own, (name, rank)
            assert said["whole"][name] == moment.tolist(), name


def test_a_part_that_is_missing_or_changed_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "step_1", tmp_path / "step_1")
    part = sorted((tmp_path / "step_1" / "state" / "parts").iterdir())[1]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{part.name}: damaged"):
        verify(tmp_path / "step_1")
    part.unlink()
    with pytest.raises(CheckpointError, match=f"{part.name}: missing"):
        verify(tmp_path / "step_1")


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both of two processes saw, and what lies there at the end."""
    path = tmp_path_factory.mktemp("failures")
    said = run_processes(2, WORKER, str(path), "fail")
    verify(path / "step_4")
    assert json.loads((path / "step_4" / "MANIFEST.json").read_text())["step"] == 4
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_refuses_all(failures: list[dict[str, Any]], rank: int) -> None:
    found = failures[rank]["refused"]
    assert (found["failures"], found["committed"], found["left"]) == (1, 1, ["step_1"])
    assert found["then"] == 2 and found["steps"] == [1, 2]
    refused = failures[rank]["refused_to_the_end"]
    assert "rank 1: " in refused["refused"] and "No space left" in refused["refused"]
    assert refused["steps"] == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_room_is_made_and_all_write_again(failures: list[dict[str, Any]], rank: int) -> None:
    found = failures[rank]["made_room"]
    assert found["committed"] == 4 and found["steps"] == [2, 4]
    assert found["failures"] == failures[rank]["refused"]["failures"] + 1


def test_a_moment_that_is_not_finite_in_one_stops_all(failures: list[dict[str, Any]]) -> None:
    texts = {found["not_finite"]["stopped"] for found in failures}
    assert len(texts) == 1
    assert texts.pop().startswith("step 5: learner.moments.wide holds a value that is not finite")
    assert failures[0]["not_finite"]["steps"] == [2, 4]
