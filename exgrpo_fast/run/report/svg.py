"""Figures as SVG: curves, stacked layers, a heat map, from numbers over steps.

Colours are the numbers 1 to 7 of the style sheet. A figure carries its data for the script that shows
the values under the pointer. With nothing to draw it is ''.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from exgrpo_fast.run.display.formatting import short

WIDTH, HEIGHT = 560, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 26
ROW_HEIGHT = 52  # of a run in a figure of changes
MAX_POINTS = 400  # more than a figure has pixels for; longer runs are averaged into bins
MAX_COLUMNS = 140  # of a heat map

Points = Sequence[tuple[float, float]]
Layer = tuple[str, Points, int]  # name, points, colour


# --- axes ----------------------------------------------------------------------------------------


class Axes:
    """Data coordinates -> SVG coordinates, with ticks at round values.

    The vertical range spans the values, and 0 if `zero` is set, and `top` if it is given.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, zero: bool, top: float | None):
        ys = [*ys, *([0.0] if zero else [])]
        self.x_low, self.x_high = widened(min(xs), max(xs))
        low, high = widened(min(ys), max(ys if top is None else [*ys, top]))
        if zero and min(ys) == max(ys) == 0.0:
            low, high = 0.0, 1.0
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
    if 0 < abs(value) < 1e-3:  # 1.5e-4: shorter than 0.00015 and than 1.5e-04
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


# --- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One curve: its raw points are faint, its running mean is drawn over them."""

    name: str
    points: Points
    colour: int
    smooth: bool = True


@dataclass(frozen=True)
class Mark:
    """A measured point, maybe with an interval, such as an evaluation."""

    x: float
    y: float
    interval: tuple[float, float] | None = None
    colour: int = 2


def line_figure(
    title: str,
    lines: Sequence[Line],
    *,
    marks: Sequence[Mark] = (),
    mark_name: str = "",
    zero: bool = True,
    top: float | None = None,
    note: str = "",
) -> str:
    """Curves over steps, and marks upon them."""
    lines = [line for line in lines if line.points]
    if not lines and not marks:
        return ""
    xs = [x for line in lines for x, _ in line.points] + [mark.x for mark in marks]
    ys = [y for line in lines for _, y in line.points] + [mark.y for mark in marks]
    ys += [bound for mark in marks for bound in mark.interval or ()]
    axes = Axes(xs, ys, zero=zero, top=top)
    curves = [_curve(line, axes) for line in lines] + [_mark(mark, axes) for mark in marks]
    legend = [(f"f{line.colour}", line.name) for line in lines]
    hover: list[tuple[str, Points]] = [(line.name, thin(line.points)) for line in lines]
    if mark_name and marks:
        legend.append(("ring", mark_name))
        hover.append((mark_name, [(mark.x, mark.y) for mark in marks]))
    drawn = axes.draw(tick_label) + "".join(curves)
    return _figure(title, drawn, legend, (axes.x_low, axes.x_high), hover, note)


def _curve(line: Line, axes: Axes) -> str:
    points = thin(line.points)
    if len(points) == 1:
        [(x, y)] = points
        return f'<circle class="f{line.colour}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3"/>'
    if not line.smooth or len(points) < 40:
        return f'<path class="s{line.colour}" d="{_path(points, axes)}"/>'
    return (
        f'<path class="s{line.colour} raw" d="{_path(points, axes)}"/>'
        f'<path class="s{line.colour}" d="{_path(running_mean(points), axes)}"/>'
    )


def _mark(mark: Mark, axes: Axes) -> str:
    x, y = axes.x(mark.x), axes.y(mark.y)
    whisker = ""
    if mark.interval:
        low, high = (axes.y(bound) for bound in mark.interval)
        whisker = f'<path class="s{mark.colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    return f'{whisker}<circle class="dot s{mark.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _path(points: Points, axes: Axes) -> str:
    return "M" + "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in points)


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means of equal stretches."""
    if len(points) <= limit:
        return list(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    bins = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Centred mean over about a twentieth of the run: it follows the trend without lagging."""
    half = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        means.append((x, (sums[b] - sums[a]) / (b - a)))
    return means


# --- stacked layers ------------------------------------------------------------------------------


def stacked_figure(
    title: str, layers: Sequence[Layer], *, note: str = "", top: float | None = None
) -> str:
    """Layers on top of each other; a layer counts as 0 where it has no value."""
    layers = [layer for layer in layers if any(y for _, y in layer[1])]
    if not layers:
        return ""
    on_grid = _on_one_grid([points for _, points, _ in layers])
    grid = [x for x, _ in on_grid[0]]
    edges = [[0.0] * len(grid)]  # the ground, then the upper edge of each layer
    for points in on_grid:
        edges.append([below + y for below, (_, y) in zip(edges[-1], points, strict=True)])
    axes = Axes(grid, edges[-1], zero=True, top=top)
    drawn = ""
    for (_, _, colour), lower, upper in zip(layers, edges[:-1], edges[1:], strict=True):
        outline = [*zip(grid, upper, strict=True), *zip(grid[::-1], lower[::-1], strict=True)]
        drawn += f'<path class="f{colour} band" d="{_path(outline, axes)}Z"/>'
    drawn += axes.draw(tick_label)
    legend = [(f"f{colour}", name) for name, _, colour in layers]
    hover = [(name, points) for (name, _, _), points in zip(layers, on_grid, strict=True)]
    return _figure(title, drawn, legend, (axes.x_low, axes.x_high), hover, note)


def _on_one_grid(series: Sequence[Points]) -> list[list[tuple[float, float]]]:
    xs = sorted({x for points in series for x, _ in points})
    tables = [dict(points) for points in series]
    if len(xs) == 1:  # one step: a band of width 1 instead of an invisible line
        [x] = xs
        return [[(x - 0.5, table.get(x, 0.0)), (x + 0.5, table.get(x, 0.0))] for table in tables]
    return [thin([(x, table.get(x, 0.0)) for x in xs]) for table in tables]


# --- heat map ------------------------------------------------------------------------------------


def heat_figure(
    title: str,
    columns: Sequence[tuple[int, Sequence[float]]],
    labels: Sequence[str],
    *,
    of: str,
    note: str,
) -> str:
    """Counts over steps, one for each label from the bottom up, darker for more.

    `of` says what is counted, such as 'questions'.
    """
    if not any(value for _, values in columns for value in values):
        return ""
    stride = math.ceil(len(columns) / MAX_COLUMNS)
    shown = list(columns)[::-1][::stride][::-1]  # the last one is always among them
    most = max(value for _, values in shown for value in values) or 1.0
    first, last = shown[0][0], shown[-1][0]
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 7}">{first}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 7}" class="r">{last}</text>'
    )
    cells = _cells([values for _, values in shown], most)
    drawn = f'<g class="f1" shape-rendering="crispEdges">{cells}</g>{_row_names(labels)}{ends}'
    legend = [("f1", f"darkest: {most:.0f} {of}")]
    hover = [
        (label, [(step, values[row]) for step, values in shown]) for row, label in enumerate(labels)
    ]
    return _figure(title, drawn, legend, widened(first, last), hover, note)


def _cells(columns: Sequence[Sequence[float]], most: float) -> str:
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    height = (HEIGHT - TOP - BOTTOM) / len(columns[0])
    # square root: a bucket with a quarter of the most is half as dark, still visible
    return "".join(
        f'<rect x="{LEFT + column * width:.2f}" y="{HEIGHT - BOTTOM - (row + 1) * height:.1f}" '
        f'width="{width:.2f}" height="{height - 1:.1f}" '
        f'fill-opacity="{math.sqrt(value / most):.2f}"/>'
        for column, values in enumerate(columns)
        for row, value in enumerate(values)
        if value
    )


def _row_names(labels: Sequence[str]) -> str:
    height = (HEIGHT - TOP - BOTTOM) / len(labels)
    return "".join(
        f'<text x="{LEFT - 7}" y="{HEIGHT - BOTTOM - (row + 0.5) * height:.1f}" dy=".32em" '
        f'class="r">{escape(label)}</text>'
        for row, label in enumerate(labels)
    )


# --- intervals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A share with its 95 % interval, where that is known."""

    value: float
    bounds: tuple[float, float] | None = None


def change_figure(
    title: str, rows: Sequence[tuple[str, Measured | None, Measured | None]], *, note: str = ""
) -> str:
    """(name, before, after) below each other on one axis from 0; the rows have the colours 1, 2, ..."""
    measured = [found for _, *pair in rows for found in pair if found]
    if not measured:
        return ""
    most = max(max((found.value, *(found.bounds or ()))) for found in measured)
    axis = ticks(0.0, widened(0.0, most)[1], 4, outside=True)
    height = TOP + BOTTOM + ROW_HEIGHT * len(rows)

    def x_of(value: float) -> str:
        return f"{RIGHT + value / axis[-1] * (WIDTH - 3 * RIGHT):.1f}"

    def dot(found: Measured, y: float, css: str) -> str:
        low, high = map(x_of, found.bounds or (found.value, found.value))
        return (
            f'<path class="{css}" d="M{low} {y}H{high}"/>'
            f'<circle class="dot {css}" cx="{x_of(found.value)}" cy="{y}" r="4"/>'
        )

    drawn = "".join(
        f'<path class="tick" d="M{x_of(tick)} {TOP}V{height - BOTTOM}"/>'
        f'<text x="{x_of(tick)}" y="{height - 7}" class="m">{100 * tick:.4g} %</text>'
        for tick in axis
    )
    for colour, (name, before, after) in enumerate(rows, start=1):
        top = TOP + ROW_HEIGHT * (colour - 1)
        drawn += f'<text x="{RIGHT + 4}" y="{top + 15}">{escape(name)}</text>'
        drawn += dot(before, top + 26, f"s{colour}") if before else ""
        drawn += dot(after, top + 38, f"s{colour} f{colour}") if after else ""
    spoken = [
        f"{name} {when} {100 * found.value:.1f} %"
        for name, before, after in rows
        for when, found in (("before", before), ("after", after))
        if found
    ]
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape("; ".join([title, *spoken]))}">{drawn}</svg></figure>'
    )


# --- what all figures share ----------------------------------------------------------------------


def _figure(
    title: str,
    drawn: str,
    legend: Sequence[tuple[str, str]],
    span: tuple[float, float],
    hover: Sequence[tuple[str, Points]],
    note: str,
) -> str:
    """Title, note, legend (style, name) and drawing; for the script, the data over the span."""
    keys = "".join(f'<span><i class="{css}"></i>{escape(name)}</span>' for css, name in legend)
    data = {
        "x": span,
        "px": [LEFT, WIDTH - RIGHT],
        "s": [[name, [[_brief(x), _brief(y)] for x, y in points]] for name, points in hover],
    }
    caption = f"<p>{escape(note)}</p>" if note else ""
    spoken = "; ".join([title, *(_spoken(name, points) for name, points in hover)])
    return (
        f'<figure data-hover="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><h3>{escape(title)}</h3>{caption}<div class=keys>{keys}</div></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(spoken)}">{drawn}'
        f'<path class="rule" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg><output></output></figure>'
    )


def _spoken(name: str, points: Points) -> str:
    """'reward from 0.2 at step 1 to 0.5 at step 24', for those who hear the page."""
    (first, old), (last, new) = points[0], points[-1]
    if first == last:
        return f"{name} {_brief(new):g} at step {last:.0f}"
    return f"{name} from {_brief(old):g} at step {first:.0f} to {_brief(new):g} at step {last:.0f}"


def _brief(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)
