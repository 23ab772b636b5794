"""`python -m exgrpo_fast` is `exgrpo-fast`."""

from exgrpo_fast.cli import main

if __name__ == "__main__":
    main()
