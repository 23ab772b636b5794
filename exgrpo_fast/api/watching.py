"""`watch(...)`: the live page of a run, from Python."""

from __future__ import annotations

from pathlib import Path

from exgrpo_fast.run.live_page import Watch


def watch(*runs: str | Path, port: int = 0) -> Watch:
    """Serve the page of `runs`, refreshed with each step, to this user's browser until `close()`.

    In a notebook the value is shown as a link. The port is one of 127.0.0.1; 0 takes a free one.
    Errors: UserError in one line for what is no run.
    """
    return Watch([Path(run) for run in runs], port=port)
