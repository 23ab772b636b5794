"""Numbers and completions formatted for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.run.display import Row


def number_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, else None: any key may be missing on any step."""
    return finite(metrics.get(key))


def finite(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond float64
        return None


def largest_pass_at_k(value: Any) -> tuple[int, float] | None:
    """{'1': 0.4, '8': 0.7} -> (8, 0.7)."""
    if not isinstance(value, Mapping):
        return None
    found = {int(k): float(v) for k, v in value.items() if str(k).isdigit() and v is not None}
    return max(found.items()) if found else None


def duration(seconds: float) -> str:
    """0.42 -> '0.4 s', 19.3 -> '19 s', 95 -> '1m35', 6720 -> '1h52', 190000 -> '2d04h'."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def short(number: float) -> str:
    """812.4 -> '812', 24100 -> '24.1k', 1310000 -> '1.31M'."""
    if abs(number) < 999.5:
        return f"{number:.0f}"
    for unit, digits in (("k", 1), ("M", 2)):
        number /= 1000
        if round(abs(number), digits) < 1000:
            return f"{number:.{digits}f}{unit}"
    return f"{number / 1000:.2f}G"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last `width` values as a row of blocks, lowest to highest."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / span) if span else 0] for v in shown)


def named(name: str, value: str, tail: str = "") -> str:
    """'reward 0.410', '' when there is no value."""
    return f"{name} {value}{tail}" if value else ""


def joined(parts: Iterable[str]) -> str:
    """'reward 0.410 · entropy 0.840': what is unknown is left out."""
    return " · ".join(part for part in parts if part)


# --- completions ---------------------------------------------------------------------------------


def best_and_worst(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """The rows to show, named; equal rewards are ordered by length (long failures are instructive)."""
    ranked = sorted(
        rows,
        key=lambda r: (number_of(r, "reward") or 0.0, -(number_of(r, "num_tokens") or 0.0)),
    )
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
