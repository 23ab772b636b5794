"""The live page: who may read it, when it changes, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from report_runs import Page, make_run, step_metrics

import exgrpo_fast
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.live_page import Watch, opened_in_browser
from exgrpo_fast.run.sinks import JsonlSink

ROOT = Path(exgrpo_fast.__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture
def watch(folder: Path):
    with Watch([folder]) as made:
        yield made


def ask(watch: Watch, path: str | None = None, method: str = "GET", **headers: str):
    """(status, headers, text); `path`: that of the address. Keywords with _ become headers with -."""
    address = urlsplit(watch.url)
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, address.path if path is None else path, skip_host="Host" in sent)
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


# --- who may read it ------------------------------------------------------------------------------


def test_the_address_shows_the_run(watch) -> None:
    status, headers, html = ask(watch)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "held-out avg@8" in Page(html).text
    assert "connect-src 'self'" in html
    assert ask(watch, method="HEAD")[::2] == (200, "")


@pytest.mark.parametrize(
    "path", ["/", "/report.html", "/{}x/", "/{}", "/x/{}/", "/../{}/", "//{}/"]
)
def test_without_the_token_there_is_nothing(watch, path) -> None:
    token = urlsplit(watch.url).path.strip("/")
    status, _, text = ask(watch, path.format(token[:-1] if "x" not in path else token))
    assert (status, text) == (404, "not found\n")


def test_the_token_is_long_and_of_one_watch_alone(watch, folder) -> None:
    token = urlsplit(watch.url).path.strip("/")
    assert len(token) >= 43  # 256 bits
    with Watch([folder]) as other:
        assert ask(other, f"/{token}/")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("192.168.1.2", 403),
        ("127.0.0.1", 200),
        ("localhost:8080", 200),  # through a tunnel
    ],
)
def test_a_name_that_was_rebound_reads_nothing(watch, host, status) -> None:
    assert ask(watch, Host=host)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "cors"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
        ({"Sec_Fetch_Site": "none", "Sec_Fetch_Mode": "navigate"}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),  # a link that is followed
    ],
)  # fmt: skip
def test_another_site_reads_nothing(watch, headers, status) -> None:
    found, sent, _ = ask(watch, **headers)
    assert found == status
    assert sent["Cross-Origin-Resource-Policy"] == "same-origin"
    assert sent["X-Frame-Options"] == "DENY"
    assert sent["Referrer-Policy"] == "no-referrer"
    assert not any(name.lower().startswith("access-control") for name in sent)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_there_is_nothing_but_reading(watch, method) -> None:
    assert ask(watch, method=method)[0] == 501


def test_it_listens_on_loopback_alone(watch) -> None:
    assert urlsplit(watch.url).hostname == watch._server.server_address[0] == "127.0.0.1"


# --- when it changes ------------------------------------------------------------------------------


def test_a_new_step_is_a_new_page_and_nothing_else_is(watch, folder) -> None:
    _, headers, _ = ask(watch)
    assert ask(watch, If_None_Match=headers["ETag"])[::2] == (304, "")
    JsonlSink(folder / "metrics.jsonl").log(21, step_metrics(21))
    status, changed, html = ask(watch, If_None_Match=headers["ETag"])
    assert status == 200 and changed["ETag"] != headers["ETag"]
    assert "reward from 0.201 at step 1 to 0.221 at step 21" in html


def test_a_run_before_its_first_step_can_be_watched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: exgrpo\n")
    with Watch([tmp_path]) as watch:
        assert "No step has finished yet." in Page(ask(watch)[2]).text
        JsonlSink(tmp_path / "metrics.jsonl").log(1, step_metrics(1))
        assert "One step has finished" in Page(ask(watch)[2]).text


def test_a_run_that_is_deleted_is_named(watch, folder) -> None:
    folder.rename(folder.with_name("elsewhere"))
    status, _, text = ask(watch)
    assert (status, text) == (503, f"there is no run '{folder}'\n")
    folder.with_name("elsewhere").rename(folder)
    assert ask(watch)[0] == 200


def test_watching_writes_nothing_into_the_run(folder) -> None:
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in [folder, *folder.rglob("*")]
        }

    before = state()
    with Watch([folder]) as watch:
        assert ask(watch)[0] == 200
    assert state() == before


# --- how it starts and ends -----------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line(watch, folder) -> None:
    port = urlsplit(watch.url).port
    with pytest.raises(UserError, match=f"port {port}: Address already in use"):
        Watch([folder], port=port or 0)


def test_a_notebook_shows_a_link(folder) -> None:
    made = exgrpo_fast.watch(folder)
    assert made._repr_html_().startswith(f'<a href="{made.url}"')
    assert ask(made)[0] == 200
    made.close()
    with pytest.raises(OSError):
        ask(made)


def test_the_browser_gets_the_token_in_a_file_for_this_user_alone(tmp_path, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", opened.append)
    with opened_in_browser("http://127.0.0.1:1/secret/"):
        (file,) = (tmp_path / "exgrpo-fast").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        assert 'url=http://127.0.0.1:1/secret/"' in file.read_text()
        assert opened == [file.as_uri()] and "secret" not in opened[0]
    assert not file.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command(folder, number, code) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    # The shell ignores it for jobs in the background, such as CI's, and a child would as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "exgrpo_fast", "watch", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")


def test_steps_are_not_sent_as_scripts(folder) -> None:
    config = json.dumps({"method": "</script><script>alert(1)</script>"})
    (folder / "config.yaml").write_text(config)
    (folder / "summary.json").unlink()
    with Watch([folder]) as watch:
        assert Page(ask(watch)[2]).tags.count("script") == 1
