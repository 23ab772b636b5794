"""The picture of README.md: the report of a run, in light and dark.

    python bench/readme.py

writes docs/report-light.svg and docs/report-dark.svg from bench/results/cpu/smollm2.json. The panels
are figures of the report page, drawn by it.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from exgrpo_fast.run.report.figures import LEARNING, Computed, Curves
from exgrpo_fast.run.report.reading import Run

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "bench/results/cpu/smollm2.json"
STYLE = ROOT / "exgrpo_fast/run/report/page.css"
SCHEMES = ("light", "dark")

METRIC_OF = {  # name in the results -> metric of the page
    "pass_at_1_of_fresh": "pass_at_1_fresh",
    "entropy": "entropy",
    "completion_len": "completion_len_mean",
}
PANELS: tuple[Curves | Computed, ...] = (LEARNING[0], LEARNING[2], LEARNING[3])
WIDTH, MARGIN, HEAD = 860, 24, 118  # pixels; HEAD: above the panels
PANEL, GAP = 260, 16  # width of a panel, and between two
PANEL_HEIGHT = 176
TEXT_SIZE = 21  # of a panel's ticks, in its own units: a panel is drawn at less than half its size


def measured_run(results: dict[str, Any]) -> Run:
    """The run that was measured, as far as its results are kept."""
    columns = {METRIC_OF[name]: values for name, values in results["steps"].items() if name in METRIC_OF}  # fmt: skip
    num_steps = len(next(iter(columns.values())))
    return Run(
        name="smollm2",
        steps=[
            {"step": step + 1} | {name: values[step] for name, values in columns.items()}
            for step in range(num_steps)
        ],
        summary={"eval_before": results["before"], "eval_after": results["after"]},
    )


def picture(results: dict[str, Any], scheme: str) -> str:
    """The SVG: headline and panels, in the colours of the page."""
    before, after = results["before"], results["after"]
    run = measured_run(results)
    height = HEAD + PANEL_HEIGHT + MARGIN
    panels = "".join(
        _panel(figure.draw(run), MARGIN + number * (PANEL + GAP))
        for number, figure in enumerate(PANELS)
    )
    cpu_seconds = next(iter(results["cpu_seconds"].values()))
    size = (
        f"{len(run.steps)} steps · {cpu_seconds} CPU seconds · {results['peak_memory_gib']} GiB · "
        f"{after['questions']} held-out questions · no GPU"
    )
    change = f"from {_percent(before)} to {_percent(after)}"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t">
<title id="t">Report of a run: ExGRPO trains SmolLM2-135M-Instruct to answer sums; held-out accuracy {change}</title>
<style>{_style(scheme)}</style>
<rect class="paper" width="{WIDTH}" height="{height}" rx="12"/>
<text class="soft" x="{MARGIN}" y="34">exgrpo · SmolLM2-135M-Instruct · sums · held-out avg@{after["n"]} with its 95 % interval</text>
<text class="big" x="{MARGIN}" y="74"><tspan class="soft">{_percent(before)} {_bounds(before)} →</tspan> <tspan class="good">{_percent(after)} {_bounds(after)}</tspan></text>
<text class="soft" x="{MARGIN}" y="98">{escape(size)}</text>
{panels}
</svg>
"""


def _percent(evaluation: dict[str, Any]) -> str:
    return f"{100 * evaluation['avg_at_n']:.1f} %"


def _bounds(evaluation: dict[str, Any]) -> str:
    return f"[{100 * evaluation['avg_at_n_low']:.1f}, {100 * evaluation['avg_at_n_high']:.1f}]"


def _panel(figure: str, left: float) -> str:
    """A figure of the page as part of the picture: its title, its keys, its drawing."""
    title = _found(r"<h3>(.*?)</h3>", figure)[0]
    view, drawn = _found(r'<svg viewBox="([^"]+)"[^>]*>(.*)</svg>', figure)
    keys, at = "", left + 14
    for css, name in re.findall(r'<span><i class="(\w+)"></i>(.*?)</span>', figure):
        style = "dot s2" if css == "ring" else css
        keys += f'<circle class="{style}" cx="{at:.0f}" cy="{HEAD + 40}" r="4"/>'
        keys += f'<text class="key" x="{at + 9:.0f}" y="{HEAD + 44}">{name}</text>'
        at += 24 + 6.2 * len(name)
    return (
        f'<rect class="card" x="{left}" y="{HEAD}" width="{PANEL}" height="{PANEL_HEIGHT}" rx="8"/>'
        f'<text class="title" x="{left + 12}" y="{HEAD + 22}">{title}</text>{keys}'
        f'<svg x="{left + 8}" y="{HEAD + 58}" width="{PANEL - 16}" height="{PANEL_HEIGHT - 66}" '
        f'viewBox="{view}" class="figure">{drawn}</svg>\n'
    )


def _found(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text, flags=re.S)
    assert found is not None, pattern
    return found.groups()


def _style(scheme: str) -> str:
    """The colours of one scheme, and of the page's rules those that draw figures."""
    style = STYLE.read_text()
    colours = re.findall(r":root \{(.*?)\}", style, flags=re.S)[SCHEMES.index(scheme)]
    rules = re.findall(r"^(?:\.[fsrm]\d?|\.tick|\.dot|\.rule|path\S+) \{.*\}$", style, flags=re.M)
    return f"""
svg {{{" ".join(colours.split())}}}
{chr(10).join(rules)}
text {{ font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); font-size: 14px }}
.paper {{ fill: var(--paper); stroke: var(--line) }}
.card {{ fill: var(--card); stroke: var(--line) }}
.soft, .key {{ fill: var(--soft) }}
.key {{ font-size: 12px }}
.big {{ font-size: 28px; font-weight: 600 }}
.big .soft {{ font-weight: 400 }}
.good {{ fill: var(--c3) }}
.title {{ font-weight: 600 }}
.figure path[class^=s] {{ stroke-width: 4 }}
.figure .dot {{ r: 7px; stroke-width: 4 }}
.figure text {{ font-size: {TEXT_SIZE}px; fill: var(--soft) }}
"""


def main() -> None:
    results = json.loads(RUN.read_text())
    for scheme in SCHEMES:
        path = ROOT / f"docs/report-{scheme}.svg"
        path.write_text(picture(results, scheme))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
