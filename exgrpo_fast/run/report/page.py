"""The page: its sections in order, the tables of what was run, its style and its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from exgrpo_fast.run.report.completions import completions_section, safe_text
from exgrpo_fast.run.report.figures import EXPERIENCE_SECTIONS, MACHINE_SECTIONS, Section
from exgrpo_fast.run.report.headline import facts, headline
from exgrpo_fast.run.report.reading import Run


def render(run: Run) -> str:
    """The whole page."""
    subject, name = safe_text(_subject(run), 200), safe_text(run.name, 200)
    style, script = _resource("page.css"), _resource("page.js")
    environment = {key: value for key, value in run.environment.items() if key != "checks"}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_security_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{subject} · {name}</title><style>{style}</style></head><body>
<header><p class=eyebrow>exgrpo-fast · {name}</p><h1>{subject}</h1>
{headline(run)}{facts(run)}</header><main>
{_figures(EXPERIENCE_SECTIONS, run)}
{completions_section(run)}
{_figures(MACHINE_SECTIONS, run)}
<h2>What was run</h2>
{_table_section("Configuration", run.config)}
{_table_section("Environment", environment)}
{_table_section("Summary", run.summary)}
</main><script>{script}</script></body></html>
"""


def _subject(run: Run) -> str:
    """'exgrpo · org/model', as much of it as is known."""
    method = run.summary.get("method") or run.config.get("method") or "run"
    model = run.config.get("model")
    model_name = model.get("name") if isinstance(model, dict) else model
    return " · ".join(str(part) for part in (method, model_name) if part)


def _resource(name: str) -> str:
    return (resources.files("exgrpo_fast.run.report") / name).read_text(encoding="utf-8")


def _security_policy(script: str) -> str:
    """Nothing from outside, and no script but ours: the page quotes what a policy wrote."""
    tag = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{tag}'"


def _figures(sections: Sequence[Section], run: Run) -> str:
    """Sections without a figure are left out."""
    drawn = [(section.title, "".join(section.draw(run))) for section in sections]
    return "".join(f"<h2>{escape(t)}</h2><div class=grid>{d}</div>" for t, d in drawn if d)


def _table_section(title: str, tree: Mapping[str, Any]) -> str:
    rows = [(key, value) for key, value in flat(tree) if value not in (None, "", [], {})]
    if not rows:
        return ""
    body = "".join(f"<tr><th>{safe_text(k, 200)}<td>{safe_text(v, 600)}" for k, v in rows[:400])
    return f"<details><summary>{escape(title)}</summary><table>{body}</table></details>"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """{'a': {'b': 1}} -> [('a.b', 1)], in order."""
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            shown = json.dumps(value, default=str) if isinstance(value, list | bool) else value
            pairs.append((f"{prefix}{key}", shown))
    return pairs
