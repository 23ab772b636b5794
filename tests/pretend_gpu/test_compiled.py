"""Every public call through Triton's own launcher, for chips that are not there."""

from __future__ import annotations

import json
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
    ("capability", "older"),
    [
        (90, False),
        pytest.param(80, False, marks=SLOW),
        pytest.param(100, False, marks=SLOW),
        pytest.param(90, True, marks=SLOW),
    ],
)
def test_public_calls_compile_as_launched(capability: int, older: bool, tmp_path: Path) -> None:
    path = [str(ROOT / "kernels"), str(ROOT / "tests")]
    if older:
        if not OLDER.exists():
            pytest.skip("`make test-all` installs triton 3.6.0 there")
        path.insert(0, str(OLDER))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, str(Path(__file__).with_name("compile_calls.py")), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == {}
    # over 20 steps whose lengths differ, each kernel is compiled once
    assert len(found["compiles"]) >= 4 and set(found["compiles"].values()) == {1}
