"""`exgrpo-fast watch`: the page of a run in the browser, refreshed with each step."""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command, natural
from exgrpo_fast.run.live_page import Watch, has_browser, opened_in_browser


def add_watch(commands: Any) -> None:
    text = "the page of a run in your browser, refreshed with each step, until Ctrl-C"
    c = add_command(commands, "watch", watch, text)
    c.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory")
    c.add_argument("--port", type=natural, default=0, help="on 127.0.0.1; default: a free one")
    c.add_argument("--no-browser", action="store_true", help="print the address alone")


def watch(arguments: argparse.Namespace) -> int:
    """Stays when the run has ended. 0 after Ctrl-C, 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    with (
        Watch(arguments.runs, port=arguments.port) as server,
        contextlib.suppress(KeyboardInterrupt),
        contextlib.ExitStack() as stack,
    ):
        print(
            f"{server.url}\nthe key in the address keeps other users out; Ctrl-C ends it",
            flush=True,
        )
        if has_browser() and not arguments.no_browser:
            stack.enter_context(opened_in_browser(server.url))
        server.wait()
    return 0


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
