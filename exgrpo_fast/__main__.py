"""`python -m exgrpo_fast` and `exgrpo-fast`.

The base install has the kernels alone: there, the command says which extra it needs.
"""

import sys


def main() -> None:
    """Run one command and exit with its code; 2 where the packages of the train extra are absent."""
    try:
        from exgrpo_fast.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("exgrpo"):
            raise  # a fault of this package, not of its installation
        install = "pip install 'exgrpo-fast[train]'"
        print(f"exgrpo-fast: {error.name} is not installed: {install}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
