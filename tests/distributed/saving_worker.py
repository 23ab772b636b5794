"""One process of a checkpoint in parts. Usage: saving_worker.py RANK COUNT STORE FOLDER WHAT"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parted_state import CURSOR, MOMENTS, WEIGHT
from safetensors.torch import save_file
from several_processes import met
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from exgrpo_fast.core import dtensor as parted
from exgrpo_fast.core.dtensor import local_shard
from exgrpo_fast.core.errors import NumericalStop
from exgrpo_fast.core.process_group import Processes, host_mesh, mesh_of
from exgrpo_fast.run.checkpoint.format import CannotSave, Checkpoints, load_state
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter


class Model:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")


class Saving:
    def __init__(self, processes: Processes, folder: Path) -> None:
        self.processes = processes
        self.mesh = mesh_of(processes)
        self.checkpoints = Checkpoints(folder, keep=2)
        self.told: list[int] = []
        model: Any = Model(self.parted(WEIGHT))
        self.writer = CheckpointWriter(
            self.checkpoints, model, processes=processes, on_committed=self.told.append
        )

    def parted(self, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None)

    def state(self) -> dict[str, Any]:
        moments = {name: self.parted(tensor) for name, tensor in MOMENTS.items()}
        return {"num_steps": 1, "learner": {"moments": moments}, "cursor": CURSOR}

    def written(self) -> dict[str, Any]:
        """Twice, from the same memory."""
        places = []
        for _ in range(2):
            self.writer.finish(1, self.state())
            places.append([t.data_ptr() for t in self.writer._state_copies._kept.values()])
        return {
            "committed": self.writer.committed,
            "told": self.told,
            "reused": places[0] == places[1],
            "copied": len(places[1]) - len(MOMENTS),  # beside its parts
        }

    def refused(self) -> dict[str, Any]:
        """Once by the disk of the second process, then no more."""
        with refusing(times=1, here=self.processes.place.rank == 1):
            self.writer.save(2, self.state())
            self.writer.join()
        self.writer.wait()
        found = {"failures": self.writer.num_failures, "committed": self.writer.committed}
        found["left"] = names(self.checkpoints.folder)
        self.writer.finish(2, self.state())
        return found | {"then": self.writer.committed}

    def refused_to_the_end(self) -> dict[str, Any]:
        with refusing(times=9, here=self.processes.place.rank == 1):
            try:
                self.writer.finish(3, self.state())
            except CannotSave as error:
                return {"refused": str(error)}
        return {}

    def made_room(self) -> dict[str, Any]:
        """A full disk: the older checkpoint leaves, and all of them write once more."""
        full = mock.patch.object(
            shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=1, used=1)
        )
        with full, refusing(times=1, here=self.processes.place.rank == 1):
            self.writer.finish(4, self.state())
        return {"failures": self.writer.num_failures, "committed": self.writer.committed}

    def not_finite(self) -> dict[str, Any]:
        """In the part of the last process alone."""
        state = self.state()
        part = local_shard(state["learner"]["moments"]["wide"])
        if self.processes.place.rank == self.processes.count - 1:
            part[-1, -1] = torch.nan
        try:
            self.writer.finish(5, state)
        except NumericalStop as error:
            return {"stopped": str(error)}
        return {}


def refusing(*, times: int, here: bool) -> Any:
    """A disk that is full the first `times` times, as torch's own writer meets it."""
    write_data, calls = dcp.HuggingFaceStorageWriter.write_data, []

    def write(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if here and len(calls) <= times:
            raise OSError(28, "No space left on device")
        return write_data(self, *arguments)

    return mock.patch.object(dcp.HuggingFaceStorageWriter, "write_data", write)


def refuse_pickles(*_: Any) -> None:
    raise AssertionError("an object is sent to another rank as a pickle")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(processes: Processes, folder: Path) -> dict[str, Any]:
    """What this process holds of each moment."""
    state = load_state(folder / "step_1", mesh=host_mesh(processes))
    moments = state["learner"]["moments"]
    return {
        "parts": {name: local_shard(tensor).tolist() for name, tensor in moments.items()},
        "whole": {name: tensor.full_tensor().tolist() for name, tensor in moments.items()},
        "cursor": state["cursor"].tolist(),
    }


def main() -> None:
    folder, what = Path(sys.argv[4]), sys.argv[5]
    with met(sys.argv[1:4]) as processes:
        if what == "read":
            print(json.dumps(read(processes, folder)))
            return
        saving = Saving(processes, folder)
        steps = ("written", "refused", "refused_to_the_end", "made_room", "not_finite")
        wanted = steps if what == "fail" else steps[:1]
        found = {}
        parted.FILE_BYTES = 50  # so that there are two of each process
        with mock.patch.object(dist.distributed_c10d, "_pickler", refuse_pickles):
            for step in wanted:
                found[step] = getattr(saving, step)()
                found[step]["steps"] = processes.broadcast(saving.checkpoints.steps())
        print(json.dumps(found))


if __name__ == "__main__":
    main()
