"""`python` with a pretend GPU, for the programs of bench/: run_program.py SCRIPT WORDS...

`-m MODULE` is Python's own, without a GPU.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

if sys.argv[1] == "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from pretend_gpu.machine import pretend_gpu

from exgrpo_kernels import runtime

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runtime.SPARSE_VOCABULARY = 256
with pretend_gpu():
    runpy.run_path(sys.argv[0], run_name="__main__")
