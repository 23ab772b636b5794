"""A page about a run that is refreshed while it runs, for this user's browser alone.

The server listens on the loopback interface, which every user of the machine reaches; so the address
holds a random token, without which each answer is 404. The other ways to the page are closed too:
a name that resolves to 127.0.0.1 (DNS rebinding) by the Host header, scripts and frames of other
sites by the headers of the answer and by Origin and Sec-Fetch-Site of the request.
Nothing is written into the run directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from email.message import Message
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.directory import is_written
from exgrpo_fast.run.report import make_page

HOST = "127.0.0.1"
LOCAL_NAMES = {"127.0.0.1", "localhost"}
REQUEST_SECONDS = 10.0  # a client that sends no request is cut off
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Page(NamedTuple):
    html: bytes
    version: str  # its ETag


class LivePage:
    """The page of some runs, made anew when a file of theirs has changed."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self.runs = list(runs)
        self._lock = threading.Lock()
        self._made_of: object = None
        self._page = Page(b"", "")

    def current(self) -> Page:
        with self._lock:
            state = [_state(run) for run in self.runs]
            if state != self._made_of:
                html = make_page(self.runs, live=True).encode()
                self._page = Page(html, f'"{hashlib.sha256(html).hexdigest()[:32]}"')
                self._made_of = state
            return self._page


def _state(run: Path) -> list[object]:
    """What changes when the page would: sizes and times of the files that it is made of."""
    files = [run / name for name in ("config.yaml", "env.json", "metrics.jsonl", "summary.json")]
    stats = []
    for file in [*files, run / "completions"]:
        with contextlib.suppress(OSError):
            found = file.stat()
            stats.append((file.name, found.st_size, found.st_mtime_ns))
    return [*stats, is_written(run)]


class Watch:
    """Serves the page of `runs` until it is closed; `url` holds the token.

    UserError where the port is taken or a run is none.
    """

    def __init__(self, runs: Sequence[Path], *, port: int = 0) -> None:
        page, token = LivePage(runs), secrets.token_urlsafe(32)
        page.current()  # a run that is none is refused here
        handler = _make_handler(page, token)
        try:
            self._server = ThreadingHTTPServer((HOST, port), handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port}: {getattr(error, 'strerror', error)}") from None
        self.url = f"http://{HOST}:{self._server.server_address[1]}/{token}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until another thread closes it, or Ctrl-C."""
        self._thread.join()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        """A link, in a notebook."""
        return f'<a href="{escape(self.url)}" target="_blank" rel="noreferrer">{self.url}</a>'


def _make_handler(page: LivePage, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "exgrpo-fast", ""
        timeout = REQUEST_SECONDS

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: a line would hold the token."""

        def do_GET(self) -> None:
            if not hmac.compare_digest(self.path.encode(), f"/{token}/".encode()):
                return self._send(404, b"not found\n")
            if not is_admitted(self.headers):
                return self._send(403, b"not from here\n")
            try:
                current = page.current()
            except UserError as error:
                return self._send(503, f"{error}\n".encode())
            if self.headers.get("If-None-Match") == current.version:
                return self._send(304, b"", ETag=current.version)
            self._send(200, current.html, ETag=current.version)

        do_HEAD = do_GET

        def _send(self, code: int, body: bytes, **more: str) -> None:
            headers = HEADERS | more | {"Content-Length": str(len(body))}
            if code >= 400:
                headers["Content-Type"] = "text/plain; charset=utf-8"
            with contextlib.suppress(OSError):  # the browser has gone
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

    return Handler


def is_admitted(headers: Message) -> bool:
    """Whether a request comes from a page of ours, or from the address bar.

    The port of Host may be another one: that of a tunnel (`ssh -L`).
    """
    if urlsplit(f"//{headers.get('Host', '')}").hostname not in LOCAL_NAMES:
        return False
    if headers.get("Origin") not in (None, f"http://{headers.get('Host')}"):
        return False
    is_navigation = headers.get("Sec-Fetch-Mode", "navigate") == "navigate"
    return is_navigation or headers.get("Sec-Fetch-Site") in ("same-origin", "none")


# --- the browser ----------------------------------------------------------------------------------


def has_browser() -> bool:
    """Whether a window can be opened here: not in a plain SSH session or a container."""
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return "SSH_CONNECTION" not in os.environ


@contextlib.contextmanager
def opened_in_browser(url: str) -> Iterator[None]:
    """Show `url` in the browser by way of a file that this user alone can read.

    As an argument of the browser's command the token would be visible to every user in the list of
    processes.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exgrpo-fast"
    file = cache / f"watch-{os.getpid()}.html"
    with contextlib.suppress(OSError, webbrowser.Error):  # the address is on the screen anyway
        cache.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.touch(mode=0o600, exist_ok=False)
        file.write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(url)}">'
            f'<meta name="referrer" content="no-referrer"><a href="{escape(url)}">the run</a>'
        )
        webbrowser.open(file.as_uri())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
