"""An OpenAI-compatible server: its address, its key, and requests that are tried again.

What comes back is a stranger's, hence bounded in size and time. The key is read from the
environment, goes into one header, and is in no message; neither is the text of a server, which may
repeat it. Loads no torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.request import getproxies, proxy_bypass

from exgrpo_fast.core.errors import UserError

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 2.0  # for one that only has to be there
MAX_WAIT_SECONDS = 60.0  # between two attempts, whatever the server asks for
_LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # may go well a moment later

T = TypeVar("T")


class EndpointError(UserError):
    """A server that cannot be used: what is wrong, for a line that names the server."""


class Endpoint:
    """Where a server is and how patiently it is asked.

    base_url: as a rule ending in `/v1`; routes are appended.
    api_key_env: the environment variable with the key; None for a server that wants none.
    timeout_seconds: for each attempt, from the connection to the last byte.
    retries: attempts after the first, for what may go well the next time.
    backoff_seconds: before the first retry; doubled before each further one.
    advice: by status, what this use of a server can say about a refusal.
    EndpointError for an address or a key that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None,
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float,
        max_body_bytes: int,
        advice: Mapping[int, str] | None = None,
    ) -> None:
        self.base_url = checked_url(base_url)
        self._key_env = api_key_env
        self._headers = {**authorization(api_key_env), "Accept-Encoding": "identity"}
        self._timeout = timeout_seconds
        self._retries = retries
        self._backoff = backoff_seconds
        self._max_body = max_body_bytes
        self._advice = dict(advice or {})
        self._random = random.Random()  # of the pauses alone; the run's own stream is not touched
        for name in ("httpx2", "httpcore2"):  # a line for each request is too much
            logging.getLogger(name).setLevel(logging.WARNING)

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url})"

    def client(self) -> httpx2.AsyncClient:
        """Belongs to the event loop in which it is first used."""
        http = _httpx2()
        return http.AsyncClient(
            headers=self._headers,
            timeout=self._timeout,
            limits=http.Limits(max_connections=None),  # the caller bounds them
            follow_redirects=False,  # the key is for this host
        )

    async def ask(
        self,
        client: httpx2.AsyncClient,
        route: str,
        read: Callable[[bytes], T | None],
        *,
        payload: Callable[[], Mapping[str, Any]] | None = None,
        expected: str,
    ) -> T:
        """Attempt until there is an answer; EndpointError when there will be none.

        `payload` is made anew for each attempt; None: GET. `read` gives None for a body that holds
        none of what is `expected`.
        """
        for attempt in range(self._retries + 1):
            outcome = await self._attempt(client, route, read, payload, expected)
            if not isinstance(outcome, _Failure):
                return outcome
            if outcome.final or attempt == self._retries:
                break
            await asyncio.sleep(self.pause(attempt, outcome.retry_after))
        raise EndpointError(outcome.what)

    async def _attempt(
        self,
        client: httpx2.AsyncClient,
        route: str,
        read: Callable[[bytes], T | None],
        payload: Callable[[], Mapping[str, Any]] | None,
        expected: str,
    ) -> T | _Failure:
        content = None if payload is None else json.dumps(payload()).encode()
        http = _httpx2()
        try:
            async with asyncio.timeout(self._timeout):
                status, retry_after, body = await self._send(client, route, content)
        except (TimeoutError, http.TimeoutException):
            return _Failure(f"no answer within {self._timeout:g} s")
        except http.HTTPError as error:
            return _Failure(f"{type(error).__name__}: is the server up, and the base URL right?")
        if status != 200:
            what = f"status {status}: {self._advise(status)}"
            return _Failure(what, status not in _LATER, retry_after)
        answer = read(body)
        return _Failure(f"its replies hold no {expected}") if answer is None else answer

    async def _send(
        self, client: httpx2.AsyncClient, route: str, content: bytes | None
    ) -> tuple[int, float, bytes]:
        """Status, seconds of Retry-After, and the body of a success; b'' for a larger one."""
        body = bytearray()
        method, url = "GET" if content is None else "POST", f"{self.base_url}{route}"
        headers = {"Content-Type": "application/json"}
        async with client.stream(method, url, content=content, headers=headers) as response:
            if response.status_code == 200:
                async for chunk in response.aiter_raw():  # raw: nothing that inflates
                    body += chunk
                    if len(body) > self._max_body:
                        return 200, 0.0, b""
            retry_after = seconds_until(response.headers.get("Retry-After"))
            return response.status_code, retry_after, bytes(body)

    def pause(self, attempt: int, retry_after: float) -> float:
        """Seconds: base x 2^attempt, half of it at random, at least what the server asks for."""
        backoff = self._backoff * 2**attempt * self._random.uniform(0.5, 1.0)
        return min(MAX_WAIT_SECONDS, max(backoff, retry_after))

    def _advise(self, status: int) -> str:
        key = f"the key in {self._key_env}" if self._key_env else "whether it wants a key"
        if 300 <= status < 400:
            return "it redirects elsewhere, and is not followed: check the base URL"
        return {
            401: f"check {key}",
            403: f"check {key}, and that it may use this model",
            404: "check the base URL, which ends in /v1 as a rule, and the model's name",
            429: "too many requests, or the quota is used up",
            **self._advice,
        }.get(status, "the server failed" if status >= 500 else "the request is refused")


class _Failure(NamedTuple):
    what: str
    final: bool = False  # the next attempt would go the same way
    retry_after: float = 0.0  # seconds


def _httpx2() -> ModuleType:
    """Imported where a server is used: training alone does without it."""
    try:
        import httpx2
    except ModuleNotFoundError:
        raise EndpointError("needs httpx2: pip install 'exgrpo-fast[train]'") from None
    return httpx2


def checked_url(base_url: str) -> str:
    http = _httpx2()
    try:
        url = http.URL(base_url)
    except (http.InvalidURL, TypeError):
        url = http.URL("")
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65_535:
        raise EndpointError("the base URL has to look like https://host/v1")
    if url.userinfo or url.query or url.fragment:  # it is printed in messages
        raise EndpointError(
            "the base URL holds more than an address; a key is named by its environment variable"
        )
    return base_url.rstrip("/")


def refuse_unreachable(base_urls: Sequence[str]) -> None:
    """EndpointError where none of the servers takes a connection; behind a proxy nothing is tried."""
    why = ""
    for url in map(_httpx2().URL, base_urls):
        if getproxies() and not proxy_bypass(url.host):
            return
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            socket.create_connection((url.host, port), timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            why = f"{url} takes no connection ({error.strerror or error})"
    raise EndpointError(why if len(base_urls) == 1 else f"none of {len(base_urls)}: {why}")


def authorization(api_key_env: str | None) -> dict[str, str]:
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise EndpointError(
            f"no key in the environment variable {api_key_env}; "
            "set it, or name no variable for a server that wants none"
        )
    if not key.isascii() or not key.isprintable() or " " in key:  # an error of HTTP would print it
        raise EndpointError(f"what {api_key_env} holds does not look like a key")
    return {"Authorization": f"Bearer {key}"}


def seconds_until(retry_after: str | None) -> float:
    """A Retry-After header, seconds or a date (RFC 9110, 10.2.3) -> seconds from now, at least 0."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        then = parsedate_to_datetime(retry_after)
        return max(0.0, (then - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
