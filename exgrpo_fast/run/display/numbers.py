"""Numbers as people read them: durations, short counts, shares, sparklines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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
