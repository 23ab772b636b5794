"""Freed memory stays with the process: counted in page faults, which no other process changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from exgrpo_fast.core.allocator import can_keep

pytestmark = pytest.mark.skipif(not can_keep(), reason="another allocator, or one that was told")

PROGRAM = """
import resource, sys
import numpy
from exgrpo_fast.core.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def touch():  # 90 MiB, given back together: more than glibc keeps of itself
    return [numpy.ones(30 * 2**20, numpy.uint8) for _ in range(3)]

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(word: str, **environment: str) -> int:
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, word],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(child.stdout)


def test_memory_that_is_used_again_costs_no_page_faults() -> None:
    default, kept = page_faults("default"), page_faults("keep")
    assert default > 1000  # else this machine's pages are too large to tell
    assert kept < default / 20


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"])
def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "libjemalloc.so.2" if name == "LD_PRELOAD" else "131072")
    assert not can_keep()
