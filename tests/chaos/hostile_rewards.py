"""A reward that does its worst: one completion in a few is met with something else each time."""

from __future__ import annotations

import os
import signal
import time


def hostile(prompts, completions, **columns):
    completion = completions[0]
    kind = sum(completion.encode()) % 12
    if kind == 0:
        raise RuntimeError("a reward that raises")
    if kind == 1:
        time.sleep(1000)
    if kind == 2:
        _ = "x" * (100 << 30)
    if kind == 3:
        os._exit(3)
    if kind == 4:
        os.killpg(0, signal.SIGKILL)
    if kind == 5:
        return [float("nan")]
    if kind == 6:
        return [float("inf")]
    return [float(len(completion) % 2 == 0)]
