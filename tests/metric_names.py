"""The metrics that docs/metrics.md lists: name -> meaning. No step may write another one."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", PAGE, re.MULTILINE)  # name, unit, meaning
METRICS = {name: meaning for name, _, meaning in ROWS}
