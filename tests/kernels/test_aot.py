"""Every launch compiles for every target, without spills, by both compilers that users have.

`make test` compiles the row kernels with all options for one; `pretend_gpu/test_compiled.py` every
public call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `make test-all` puts the older compiler, which torch 2.11 pins, beside the environment.
OLDER = Path(sys.prefix) / "triton-3.6.0"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("version", "words", "launches"),
    [
        ("installed", ["90", "--only", "bf16, V=151936, all options"], 6),
        pytest.param("installed", ["80", "89", "90", "100"], 184, marks=SLOW),
        pytest.param("3.6.0", ["80", "89", "90", "100"], 184, marks=SLOW),
    ],
)
def test_launches_compile_clean(version: str, words: list[str], launches: int) -> None:
    path = ["kernels"]
    if version == "3.6.0":
        if not OLDER.exists():
            pytest.skip("`make test-all` installs triton 3.6.0 there")
        path.insert(0, str(OLDER))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0"}
    finished = subprocess.run(
        [sys.executable, "bench/aot.py", "--targets", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-2000:]
    lines = finished.stdout.splitlines()
    if version != "installed":
        assert lines[0].startswith(f"triton {version}:")
    assert lines[-1] == f"{launches} compiled clean, 0 with problems"


def test_a_kernel_that_spills_is_reported(tmp_path):
    """The same kernels held to 24 registers: the check has to fail."""
    script = tmp_path / "spill.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        "import aot\n"
        "from exgrpo_kernels import runtime\n"
        "runtime.row_kernel_shape = lambda columns: runtime.RowKernelShape(4096, 4, 24)\n"
        "sys.argv = ['aot.py', '--targets', '90', '--only', 'statistics bf16, V=151936, plain']\n"
        "sys.exit(aot.main())\n"
    )
    environment = os.environ | {"PYTHONPATH": "kernels", "TRITON_INTERPRET": "0"}
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 1, finished.stderr[-2000:]
    assert "spills" in finished.stdout and "0 compiled clean, 1 with problems" in finished.stdout


# Prints how many specialisations each kernel has over steps whose lengths change.
LENGTHS = """
import collections
import aot
from exgrpo_kernels import runtime

runtime.padded_rows = lambda num_rows, chunk_rows, device: -(-num_rows // 16) * 16
launches = []
for step in range(20):
    rows = 1 + 37 * step
    launches += aot.launches_of(
        "", aot.FP32, aot.FP32, 300, True, ["clip k3"], num_rows=rows, offset=step
    )
    launches += aot.sparse_launches([90], [(aot.BF16, aot.BF16, 96)], num_rows=rows)
kinds = collections.defaultdict(set)
for launch in launches:
    parts = launch.signature, launch.constants, launch.attributes
    kinds[launch.name].add(str(parts))
print(*(f"{name.split()[0]} {len(found)}" for name, found in sorted(kinds.items())), sep=",")
"""


def test_lengths_that_change_from_step_to_step_compile_nothing_new(tmp_path):
    script = tmp_path / "lengths.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'bench')!r})\n{LENGTHS}")
    environment = os.environ | {"PYTHONPATH": "kernels", "TRITON_INTERPRET": "0"}
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.strip().split(",") == [
        "add_segments 1",
        "gradient 1",
        "hidden_gradient 1",
        "policy_gradient 1",
        "statistics 1",
        "weight_gradient 1",
        "weight_gradient 1",
    ]
