"""The programs of bench/ still find what they measure."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from several_processes import environment

BENCH = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py"))


@pytest.fixture(scope="module")
def broken() -> dict[str, str]:
    """script -> the error of importing it; one interpreter for all."""
    program = (
        "import importlib, json, sys\n"
        "broken = {}\n"
        f"for name in {SCRIPTS}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        broken[name] = str(error)\n"
        "json.dump(broken, sys.stdout)\n"
    )
    compiled = {k: v for k, v in environment().items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=BENCH, env=compiled, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_imported(broken: dict[str, str], script: str) -> None:
    assert script not in broken, broken[script]


def test_the_exponent_of_growth_is_that_of_a_power_law(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    growth = importlib.import_module("growth")
    sizes = [1, 2, 8, 64]
    for power in (0.0, 1.0, 2.0):
        found = growth.exponent(sizes, [3.0 * size**power for size in sizes])
        assert found == pytest.approx(power, abs=1e-9)
