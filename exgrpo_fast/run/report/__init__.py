"""report.html: one self-contained page about what a run did and whether it learned.

Reads the run directory alone, and accepts files that are missing, short or torn: a report is most
useful after a run that failed. The figures are SVG drawn here, so that they are
small, sharp, follow the reader's light or dark theme, and need nothing from the network.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.directory import whole_file
from exgrpo_fast.run.report.comparison import MAX_RUNS, differences, results
from exgrpo_fast.run.report.completions import completions_section, safe_text
from exgrpo_fast.run.report.figures import EXPERIENCE_SECTIONS, MACHINE_SECTIONS
from exgrpo_fast.run.report.headline import facts, headline, signal, status
from exgrpo_fast.run.report.reading import Run, flat, read_run, read_runs

__all__ = ["Run", "make_page", "read_run", "read_runs", "render", "write_page", "write_report"]


def write_report(run_dir: Path | str) -> Path:
    """Write DIR/report.html from what DIR holds, and return its path.

    For the run itself, at its end: its lock is still held, and the page must not say that it runs.
    """
    path = Path(run_dir) / "report.html"
    write_page(path, render(replace(read_run(Path(run_dir)), is_running=False)))
    return path


def make_page(folders: Sequence[Path], *, live: bool = False) -> str:
    """The page of one run, or of several beside each other. UserError in one line for what is none.

    `live`: a page that asks its server for a newer one, also before the first step has finished.
    """
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one page: at most {MAX_RUNS}")
    runs = read_runs(folders, may_be_empty=live)
    return render(runs[0], live=live) if len(runs) == 1 else render_comparison(runs, live=live)


def write_page(path: Path, page: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# --- the page: its sections in order, the tables of what was run, its style and its script -------


def render(run: Run, *, live: bool = False) -> str:
    """The whole page of a run; `live`: with a script that asks its server for a newer one."""
    subject, name = safe_text(_subject(run), 200), safe_text(run.name, 200)
    header = f"<h1>{subject}</h1>{status(run, live=live)}{headline(run)}{signal(run)}{facts(run)}"
    main = (
        _sections((section.title, section.draw(run)) for section in EXPERIENCE_SECTIONS)
        + completions_section(run)
        + _sections((section.title, section.draw(run)) for section in MACHINE_SECTIONS)
        + "<h2>What was run</h2>"
        + _table_section("Configuration", run.config)
        + _table_section("Environment", run.shown_environment)
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
