"""What a person sees while a run goes on: a live screen on a terminal, plain lines elsewhere.

A line leads with what tells whether the policy learns (reward, pass@1, learnable share, entropy)
and how fast (tokens per second). The loss is not on it: in policy gradients its value says nothing,
and a newcomer reads 0.0000 as a broken run. It is in metrics.jsonl.

Every text passes `clean_text`: completions are written by the policy, and a terminal obeys.
"""

from exgrpo_fast.run.display.screen import Advance, NullScreen, Row, Screen

__all__ = ["Advance", "NullScreen", "Row", "Screen"]
