"""What is loaded before a command answers and before a run starts: counts of modules, no clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from several_processes import environment

PROGRAM = """
import json, sys
found = [sorted(sys.modules)]
for statement in sys.argv[1:]:
    exec(statement)
    found.append(sorted(sys.modules))
json.dump(found, sys.stdout)
"""


# Of these packages commands load something before they load torch, and a run beside what loads models.
LIGHT = {
    "annotated_types",
    "cython_runtime",
    "packaging",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
# Of torch, torch.distributed.checkpoint: with transformers 5.17 a run is the first to load it.
OF_A_RUN = LIGHT | {
    "torch",
    "psutil",
    "pyarrow",
    "rich",
    "tokenizers",
    "tqdm",
    "transformers",
    "xxhash",
}


def loaded_by(*statements: str) -> list[Counter[str]]:
    """For each statement, in one process: top-level package -> modules that it has added."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *statements],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    states = [set(names) for names in json.loads(done.stdout)]
    return [
        Counter(name.split(".")[0] for name in after - before)
        for before, after in zip(states, states[1:], strict=False)
    ]


def third_party(found: Counter[str]) -> set[str]:
    ours = {"exgrpo_fast", "exgrpo_kernels"}
    return {name for name in found if not name.startswith("_")} - sys.stdlib_module_names - ours


@pytest.fixture(scope="module")
def of_a_run() -> list[Counter[str]]:
    """Of torch, the kernels, what loads a model, and the body of `train`, one after the other."""
    return loaded_by(
        "import torch",
        "import exgrpo_kernels",
        "import transformers.modeling_utils",
        "import exgrpo_fast.cli.train_run",
    )


def test_commands_and_refusals_load_little() -> None:
    """The command line with every command's arguments, and the config with its checks."""
    (found,) = loaded_by("import exgrpo_fast.cli")
    assert third_party(found) <= LIGHT
    assert found["exgrpo_fast"] <= 95 and found.total() <= 360


def test_the_losses_add_next_to_nothing_to_torch(of_a_run: list[Counter[str]]) -> None:
    _, kernels, *_ = of_a_run
    assert set(kernels) <= {"exgrpo_kernels"} and kernels.total() <= 12


def test_a_run_adds_little_to_torch_and_the_loader_of_models(of_a_run: list[Counter[str]]) -> None:
    *_, run = of_a_run
    assert third_party(run) <= OF_A_RUN
    assert run["exgrpo_fast"] <= 225 and run.total() <= 480
