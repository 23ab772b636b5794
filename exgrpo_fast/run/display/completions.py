"""Which completions of a group are shown, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.run.display.numbers import joined, number_of, short
from exgrpo_fast.run.display.screen import Row


def best_and_worst(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """The rows to show, named; equal rewards are told apart by length (long failures teach)."""

    def order(row: Row) -> tuple[float, float]:
        return number_of(row, "reward") or 0.0, -(number_of(row, "num_tokens") or 0.0)

    ranked = sorted(rows, key=order)
    if len(ranked) < 2:
        return [("only", row) for row in ranked]
    return [("best", ranked[-1]), ("worst", ranked[0])]


def verdict_line(row: Row) -> str:
    """'reward 1.00 (ok) · 212 tokens · cut at the limit · replay'."""
    reward = number_of(row, "reward")
    tokens = number_of(row, "num_tokens")
    reason = f" ({clean_line(row['reason'], max_line=60)})" if row.get("reason") else ""
    return joined(
        [
            "" if reward is None else f"reward {reward:.2f}{reason}",
            "" if tokens is None else f"{short(tokens)} tokens",
            "cut at the limit" if row.get("truncated") else "",
            clean_line(row["source"]) if row.get("source") not in (None, "fresh") else "",
        ]
    )


def excerpt(text: object, *, limit: int = 600, lines: int = 14) -> str:
    """Beginning and end of a long text: the set-up and the answer are what one wants to see."""
    safe = clean_text(text).strip("\n")
    rows = safe.split("\n")
    if len(rows) > lines:
        head, tail = "\n".join(rows[: lines // 2]), "\n".join(rows[-lines // 2 :])
    else:
        half = len(safe) // 2
        head, tail = safe[:half], safe[half:]
    if len(head) + len(tail) > limit:
        head, tail = head[: limit // 2], tail[-(limit // 2) :]
    gone = len(safe) - len(head) - len(tail)
    return f"{head.rstrip()}\n… {gone} characters …\n{tail.lstrip()}" if gone else safe
