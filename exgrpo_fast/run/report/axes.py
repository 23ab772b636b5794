"""The plane of a figure: its size, its ticks at round values, and where a point lies on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from exgrpo_fast.run.display import short

WIDTH, HEIGHT = 560, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26


class Axes:
    """Data coordinates -> SVG coordinates, with ticks at round values.

    The vertical range spans the values, and 0 if `zero` is set, and `top` if it is given.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, zero: bool, top: float | None):
        ys = [*ys, *([0.0] if zero else [])]
        self.x_low, self.x_high = widened(min(xs), max(xs))
        low, high = widened(min(ys), max(ys if top is None else [*ys, top]))
        self.y_ticks = ticks(low, high, 4, outside=True)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_ticks = [t for t in ticks(self.x_low, self.x_high, 6) if t == int(t)]

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self, label: Callable[[float], str]) -> str:
        parts = []
        for tick in self.y_ticks:
            y = f"{self.y(tick):.1f}"
            parts.append(f'<path class="tick" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y}" dy=".32em" class="r">{label(tick)}</text>')
        for tick in self.x_ticks:
            x = f"{self.x(tick):.1f}"
            parts.append(f'<text x="{x}" y="{HEIGHT - 7}" class="m">{tick:.0f}</text>')
        return "".join(parts)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range that is never empty, nor so narrow that its ticks would be equal numbers."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = abs(low) * 0.1 or 0.5
    return low - half, high + half


def ticks(low: float, high: float, count: int, *, outside: bool = False) -> list[float]:
    """About `count` round values in the range; `outside` adds the next one at either end."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    slack = 1e-9 if outside else -1e-9  # 0.3 / 0.1 is a little less than 3
    first = (math.floor if outside else math.ceil)(low / step + slack)
    last = (math.ceil if outside else math.floor)(high / step - slack)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def tick_label(value: float) -> str:
    if abs(value) >= 1000:
        return short(value).replace(".0k", "k").replace(".00M", "M")
    return f"{value:.4g}"
