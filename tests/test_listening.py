"""Where sockets listen: on loopback, unless an address is named."""

from __future__ import annotations

import ast
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import make_run

from exgrpo_fast.config.sections import ServerConfig
from exgrpo_fast.rollout.server.weight_transfer import BroadcastSender
from exgrpo_fast.run.live_page import Watch

ROOT = Path(__file__).parents[1]
LISTENING = "0A"  # a state in /proc/net/tcp


def listening() -> set[str]:
    """Addresses on which this process listens, in hexadecimal."""
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            own.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in own:
                found.add(fields[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("host", [None, "127.0.0.2"])
def test_the_store_of_the_weights_listens_on_its_address_alone(host: str | None) -> None:
    before = listening()
    named: dict[str, Any] = {} if host is None else {"host": host}
    sender = BroadcastSender(torch.float32, device=torch.device("cpu"), **named)
    new = {address.split(":")[0] for address in listening() - before}
    assert new == {"0100007F" if host is None else "0200007F"}
    sender.close()


def test_what_listens_is_told_loopback_by_default() -> None:
    assert ServerConfig().host == "127.0.0.1"
    tree = ast.parse((ROOT / "exgrpo_fast/rollout/server/server.py").read_text())
    (settings,) = (
        n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ServerSettings"
    )
    defaults = {
        ast.unparse(n.target): ast.unparse(n.value)
        for n in settings.body
        if isinstance(n, ast.AnnAssign) and n.value is not None
    }
    assert defaults["host"] == "'127.0.0.1'"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_page_of_a_run_listens_on_loopback(tmp_path: Path) -> None:
    make_run(tmp_path, steps=2)
    before = listening()
    with Watch([tmp_path]):
        assert {address.split(":")[0] for address in listening() - before} == {"0100007F"}
