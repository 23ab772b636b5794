"""The page: its sections in order, the tables of what was run, its style and its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from exgrpo_fast.run.report.comparison import differences, results
from exgrpo_fast.run.report.completions import completions_section, safe_text
from exgrpo_fast.run.report.figures import EXPERIENCE_SECTIONS, MACHINE_SECTIONS
from exgrpo_fast.run.report.headline import facts, headline, signal, status
from exgrpo_fast.run.report.reading import Run, flat


def render(run: Run, *, live: bool = False) -> str:
    """The whole page of a run; `live`: with a script that asks its server for a newer one."""
    subject, name = safe_text(_subject(run), 200), safe_text(run.name, 200)
    environment = {key: value for key, value in run.environment.items() if key != "checks"}
    header = f"<h1>{subject}</h1>{status(run, live=live)}{headline(run)}{signal(run)}{facts(run)}"
    main = (
        _sections((section.title, section.draw(run)) for section in EXPERIENCE_SECTIONS)
        + completions_section(run)
        + _sections((section.title, section.draw(run)) for section in MACHINE_SECTIONS)
        + "<h2>What was run</h2>"
        + _table_section("Configuration", run.config)
        + _table_section("Environment", environment)
        + _table_section("Summary", run.summary)
    )
    return _page(f"{subject} · {name}", name, header, main, live=live)


def render_comparison(runs: Sequence[Run], *, live: bool = False) -> str:
    """The page of several runs: a figure for each metric, a curve for each run."""
    names = [safe_text(run.name, 200) for run in runs]
    sections = (*EXPERIENCE_SECTIONS, *MACHINE_SECTIONS)
    main = (
        results(runs)
        + _sections((section.title, section.compare(runs)) for section in sections)
        + differences(runs)
    )
    header = f"<h1>{len(runs)} runs</h1>"
    return _page(" · ".join(names), "comparison", header, main, live=live)


def _page(title: str, eyebrow: str, header: str, main: str, *, live: bool) -> str:
    """`title` to `main` are HTML."""
    style = _resource("page.css")
    script = _resource("page.js") + (_resource("live.js") if live else "")
    message = "<p id=connection role=status></p>" if live else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_security_policy(script, live=live)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title><style>{style}</style></head><body>
<header><p class=eyebrow>exgrpo-fast · {eyebrow}</p>{header}</header><main>
{main}
</main>{message}<script>{script}</script></body></html>
"""


def _subject(run: Run) -> str:
    """'exgrpo · org/model', as much of it as is known."""
    method = run.summary.get("method") or run.config.get("method") or "run"
    model = run.config.get("model")
    model_name = model.get("name") if isinstance(model, dict) else model
    return " · ".join(str(part) for part in (method, model_name) if part)


def _resource(name: str) -> str:
    return (resources.files("exgrpo_fast.run.report") / name).read_text(encoding="utf-8")


def _security_policy(script: str, *, live: bool) -> str:
    """Nothing from outside, and no script but ours: the page quotes what a policy wrote."""
    tag = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{tag}'"
    return policy + ("; connect-src 'self'" if live else "")


def _sections(sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Title and figures of each; those without a figure are left out."""
    drawn = [(title, "".join(figures)) for title, figures in sections]
    return "".join(f"<h2>{escape(t)}</h2><div class=grid>{d}</div>" for t, d in drawn if d)


def _table_section(title: str, tree: Mapping[str, Any]) -> str:
    rows = [(key, value) for key, value in flat(tree) if value not in (None, "", [], {})]
    if not rows:
        return ""
    body = "".join(
        f"<tr><th scope=row>{safe_text(k, 200)}<td>{safe_text(v, 600)}" for k, v in rows[:400]
    )
    return f"<details><summary>{escape(title)}</summary><table>{body}</table></details>"
