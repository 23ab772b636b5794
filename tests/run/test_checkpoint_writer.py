"""Saving beside training: what is written, what a refusing disk does, what is never written."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.model.hf_folder import HuggingFaceFolder
from exgrpo_fast.model.policy import Policy, load_model
from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints, load_state
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter, HostCopies


class Model:
    """A model of one weight; `gate` holds the writer up, `refuse` is what the disk says."""

    def __init__(self) -> None:
        self.weight = torch.arange(6.0).reshape(2, 3)
        self.gate = threading.Event()
        self.gate.set()
        self.refuse: OSError | None = None

    def tensors(self):
        return {"weight": self.weight}

    def write(self, folder: Path, tensors) -> None:
        assert self.gate.wait(10)
        if self.refuse:
            raise self.refuse
        folder.mkdir()
        (folder / "weight").write_bytes(tensors["weight"].numpy().tobytes())


def weight_in(path: Path) -> list[float]:
    data = bytearray((path / "hf" / "weight").read_bytes())
    return torch.frombuffer(data, dtype=torch.float32).tolist()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def writer(model: Model, said: list[str], tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(Checkpoints(tmp_path / "c", keep=2), model, warn=said.append)


def state(number: float = 0.0) -> dict:
    return {"num_steps": 1, "learner": {"moment": torch.full((3,), number)}, "list": [1, 2]}


def test_what_changes_after_the_copy_is_not_in_the_checkpoint(writer, model: Model) -> None:
    model.gate.clear()
    mutable = state(1.0)
    writer.save(1, mutable)
    assert writer.checkpoints.steps() == [] and writer.committed is None
    model.weight += 100.0
    mutable["learner"]["moment"] += 100.0
    mutable["list"].append(3)
    model.gate.set()
    writer.wait()
    path = writer.checkpoints.folder / "step_1"
    verify(path)
    assert writer.committed == 1
    assert weight_in(path) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    found = load_state(path)
    assert found["learner"]["moment"].tolist() == [1.0] * 3 and found["list"] == [1, 2]


def test_the_next_save_waits_for_the_one_before(writer, model: Model) -> None:
    model.gate.clear()
    writer.save(1, state())
    threading.Timer(0.2, model.gate.set).start()
    writer.save(2, state())  # overwrites the copies of the first
    assert writer.committed == 1
    writer.wait()
    assert writer.checkpoints.steps() == [1, 2]


def test_commits_are_told_in_order(model: Model, tmp_path: Path) -> None:
    told: list[int] = []
    writer = CheckpointWriter(Checkpoints(tmp_path), model, on_committed=told.append)
    for step in (3, 4):
        writer.save(step, state())
        writer.wait()
        assert told[-1] == step and writer.checkpoints.steps()[-1] == step
    assert writer.finish(5, state()) == tmp_path / "step_5"
    assert told == [3, 4, 5]


def test_two_refusals_are_said_and_the_third_ends_the_run(writer, model: Model, said) -> None:
    writer.finish(1, state())
    model.refuse = OSError(28, "No space left on device")
    for step in (2, 3):
        writer.save(step, state())
        writer.wait()
    assert writer.num_failures == 2
    assert [line.startswith("NOT SAVED: checkpoint of step") for line in said] == [True, True]
    assert "No space left on device" in said[0] and "next interval" in said[0]
    writer.save(4, state())
    with pytest.raises(CannotSave, match="step 4"):
        writer.wait()
    assert writer.checkpoints.newest_valid(pytest.fail) == writer.checkpoints.folder / "step_1"


def test_a_save_that_succeeds_forgives(writer, model: Model) -> None:
    for step in range(1, 9):
        model.refuse = OSError(5, "Input/output error") if step % 3 else None
        writer.save(step, state())
        writer.wait()
    assert writer.num_failures == 6 and writer.committed == 6


def test_the_last_save_of_a_run_may_not_be_refused(writer, model: Model) -> None:
    model.refuse = OSError(30, "Read-only file system")
    with pytest.raises(CannotSave, match="Read-only"):
        writer.finish(1, state())


def test_a_nearly_full_disk_is_said_beforehand(writer, said, monkeypatch) -> None:
    num_bytes = 6 * 4 + 3 * 4
    disk = SimpleNamespace(free=2 * num_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    writer.finish(1, state())
    assert said == []
    disk.free -= 1
    writer.finish(2, state())
    assert len(said) == 1 and said[0].startswith("the disk is nearly full: 0.00 GiB free")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["model.weight", "learner.moment"])
def test_what_is_not_finite_is_never_saved(writer, model: Model, place: str, value: float) -> None:
    mutable = state()
    if place == "model.weight":
        model.weight[1, 2] = value
    else:
        mutable["learner"]["moment"][1] = value
    writer.save(1, mutable)
    with pytest.raises(NumericalStop, match=f"step 1: {place} holds a value that is not finite"):
        writer.wait()
    assert writer.checkpoints.steps() == []


def test_infinities_that_replay_keeps_are_its_own(writer) -> None:
    kept = state() | {"replay": {"entropies": torch.tensor([float("inf")])}}
    assert load_state(writer.finish(1, kept))["replay"]["entropies"].tolist() == [float("inf")]


def test_copies_reuse_their_memory_and_keep_ties() -> None:
    copies, weight = HostCopies(), torch.ones(4)
    first = copies.take({"a": weight, "b": weight, "c": torch.zeros(2)})
    assert first["a"] is first["b"] and first["a"] is not weight
    place = first["a"].data_ptr()
    weight += 1
    second = copies.take({"a": weight, "b": weight, "c": torch.zeros(3)})
    assert second["a"].data_ptr() == place and second["b"].tolist() == [2.0] * 4
    assert second["c"].shape == (3,)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_is_that_of_save_pretrained(
    tokenizer, model_folder: Path, tmp_path: Path, tied: bool
) -> None:
    model = load_model(str(model_folder))
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    policy = Policy(model)
    model.save_pretrained(tmp_path / "plain")
    folder = HuggingFaceFolder(policy, tokenizer)
    writer = CheckpointWriter(Checkpoints(tmp_path / "c"), folder)
    writer.save(1, {"num_steps": 1})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    writer.wait()
    ours = tmp_path / "c" / "step_1" / "hf"
    plain, saved = (load_file(f / "model.safetensors") for f in (tmp_path / "plain", ours))
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert ("lm_head.weight" in saved) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(7)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)
