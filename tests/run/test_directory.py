"""One run a folder, its owner by name, and files that are whole or not there."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from exgrpo_fast.run.directory import RunFolder, RunFolderError


def test_the_owner_of_the_lock_is_named(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, resume=False)
    owner = rf"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(RunFolderError, match=rf"another run is writing there \({owner}\)$"):
        RunFolder(tmp_path, resume=True)
    first.close()
    RunFolder(tmp_path, resume=True).close()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.log"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RunFolderError, match=f"{name}: is a folder, and a run has a file there"):
        RunFolder(tmp_path, resume=True)


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    folder = RunFolder(tmp_path, resume=True)
    with pytest.raises(RunFolderError, match=r"summary.json: Expecting .*; remove it"):
        folder.read_json("summary.json")
    folder.close()


def test_the_lock_is_held_until_the_last_descriptor_is_closed(tmp_path: Path) -> None:
    """A supervisor's worker keeps it: nobody starts beside it when the supervisor dies."""
    first = RunFolder(tmp_path, resume=False)
    second = RunFolder(tmp_path, resume=True, lock=os.dup(first.lock_descriptor))
    first.close()
    with pytest.raises(RunFolderError, match="another run"):
        RunFolder(tmp_path, resume=True)
    second.close()
    RunFolder(tmp_path, resume=True).close()


def test_a_name_left_by_a_dead_owner_is_not_reported(tmp_path: Path, monkeypatch) -> None:
    first = RunFolder(tmp_path, resume=False)
    (tmp_path / ".lock").write_text(f"process {2**22 - 1} on {socket.gethostname()}\n")
    waits: list[float] = []

    def present_owner_writes(seconds: float) -> None:
        waits.append(seconds)
        (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    monkeypatch.setattr("exgrpo_fast.run.directory.time.sleep", present_owner_writes)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        RunFolder(tmp_path, resume=True)
    assert len(waits) == 1
    first.close()


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    folder = RunFolder(tmp_path, resume=False)
    folder.write_text("config.yaml", "old")

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        folder.write_text("config.yaml", "new and longer")
    assert folder.config.read_text() == "old"
    folder.close()


def test_a_log_whose_disk_is_full_says_nothing_and_ends_nothing(tmp_path: Path, capfd) -> None:
    folder = RunFolder(tmp_path, resume=False)
    (tmp_path / "run.log").symlink_to("/dev/full")
    folder.start_log()
    logging.getLogger("exgrpo_fast.test").error("lost")
    folder.append_to_log("lost, too")
    folder.close()
    assert capfd.readouterr() == ("", "")


def test_the_newest_step_is_that_of_the_highest_number(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resume=False)
    assert folder.newest_step() is None
    for name in ("step_9", "step_10", "set-aside-step_12", ".tmp-step_13", "step_x"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.newest_step() == 10
    folder.close()
