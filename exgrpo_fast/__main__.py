"""`python -m exgrpo_fast` and `exgrpo-fast`.

The base install has the kernels alone: there, the command says which extra it needs.
"""

import sys
from importlib.util import find_spec

# Imported by every command that loads a model; `doctor` and others do without.
OF_THE_TRAIN_EXTRA = ("transformers", "safetensors", "pyarrow")
MODEL_COMMANDS = ("train", "eval", "sample", "bench", "export", "fetch", "init")
INSTALL = "pip install 'exgrpo-fast[train]'"


def main() -> None:
    """Run one command and exit with its code; 2 where the packages of the train extra are absent."""
    if sys.argv[1:2] and sys.argv[1] in MODEL_COMMANDS:
        for package in OF_THE_TRAIN_EXTRA:
            if find_spec(package) is None:
                refuse(package)
    try:
        from exgrpo_fast.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("exgrpo"):
            raise  # a fault of this package, not of its installation
        refuse(error.name)
    else:
        run()


def refuse(package: str) -> None:
    print(f"exgrpo-fast: {package} is not installed: {INSTALL}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
