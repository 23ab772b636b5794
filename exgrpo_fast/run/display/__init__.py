"""The output of a run: a live screen on a terminal (`live.py`), plain lines elsewhere (`plain.py`).

A line begins with what shows whether the policy learns (reward, pass@1, learnable share, entropy) and
how fast (tokens per second). The loss is left out: the value of a policy gradient's loss means
little, and 0.0000 looks like a broken run. It is in metrics.jsonl.

Every text passes `clean_text`: a policy may write control characters, which a terminal executes.
"""

from exgrpo_fast.run.display.screen import Advance, NullScreen, Row, Screen

__all__ = ["Advance", "NullScreen", "Row", "Screen"]
