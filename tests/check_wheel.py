"""What a user gets from the built wheel; run by `make test-wheel` in its environment.

    check_wheel.py kernels    after `pip install exgrpo-fast`
    check_wheel.py train      after `pip install 'exgrpo-fast[train,gym]'`

No test module: it runs where pytest is not installed, outside of the checkout.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

COMMAND = Path(sys.executable).with_name("exgrpo-fast")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)


def expect(holds: bool, what: str, details: str = "") -> None:
    if not holds:
        sys.exit(f"wheel: {what}\n{details}")


def check_origin() -> None:
    """The package comes from the environment, not from a checkout around it."""
    for name in ("exgrpo_kernels", "exgrpo_fast"):
        spec = importlib.util.find_spec(name)
        origin = "" if spec is None or spec.origin is None else spec.origin
        expect("site-packages" in origin, f"{name} comes from {origin or 'nowhere'}")


def check_kernels() -> None:
    for name in ("transformers", "numpy", "pydantic"):
        expect(importlib.util.find_spec(name) is None, f"{name} came along with the kernels")
    made = run(sys.executable, "-m", "exgrpo_kernels")
    expect(
        made.returncode == 0 and made.stdout.endswith("\ncorrect\n"), "the self-check", made.stderr
    )
    for module in ("adapters", "adapters.prime_rl"):
        made = run(sys.executable, "-c", f"import exgrpo_kernels.{module}")
        expect(made.returncode == 0, f"exgrpo_kernels.{module}", made.stderr)
    made = run(COMMAND, "train", "quickstart")
    expect(made.returncode == 2, f"exit code {made.returncode} without [train]", made.stderr)
    expect(made.stderr.count("\n") == 1, "more than one line without [train]", made.stderr)
    expect("pip install 'exgrpo-fast[train]'" in made.stderr, "the remedy", made.stderr)


def check_train() -> None:
    made = run(COMMAND, "--version")
    expect(made.stdout == f"exgrpo-fast {version('exgrpo-fast')}\n", made.stdout, made.stderr)
    for words in (["--help"], ["doctor"], ["train", "--help"]):
        made = run(COMMAND, *words)
        expect(made.returncode == 0 and made.stdout != "", " ".join(words), made.stderr)
    with tempfile.TemporaryDirectory() as out:
        small = ["--warm_start.batches", "20", "--rollout.prompts_per_step", "4"]
        small += ["--data.eval_size", "8", "--stop-after", "1", "--out", out]
        made = run(COMMAND, "train", "quickstart", *small)
        expect(made.returncode == 0, "the quickstart", made.stdout + made.stderr)
        expect((Path(out) / "report.html").stat().st_size > 10_000, "the report")
    made = run(COMMAND, "train", "exgrpo", "--model.name", "m", "--data.train", "d", "--dry-run")
    expect(made.returncode in (0, 2), "a recipe", made.stderr)


if __name__ == "__main__":
    check_origin()
    {"kernels": check_kernels, "train": check_train}[sys.argv[1]]()
    print(f"wheel, {sys.argv[1]}: correct")
