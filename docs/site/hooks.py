"""Hooks of mkdocs: pages from outside docs/, the order of docs/README.md, formulas, API pages.

A page is the same file on GitHub and on the site. So a link is one between files of the repository;
here it is turned into one between pages, and what it leads to becomes part of the site.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
SOURCE = re.compile(r'(\b(?:src|srcset)=")([^":]+)(")')  # of a picture in HTML
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
    re.S,
)
CELL = re.compile(r"<td[^>]*>.*?</td>", re.S)
CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")

# File of the repository -> page of the site, for those that do not keep their name below docs/.
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FOLDERS = {"examples": "examples.md"}  # a link to a folder -> the page that shows what is in it
API = {
    "Training from Python": (
        "exgrpo_fast.api.training.train",
        "exgrpo_fast.api.training.TrainedRun",
        "exgrpo_fast.api.training.RunStopped",
        "exgrpo_fast.api.evaluation.evaluate",
    ),
    "Fused losses": (
        "exgrpo_kernels.policy_loss.linear_policy_loss",
        "exgrpo_kernels.policy_loss.policy_loss",
        "exgrpo_kernels.policy_loss.PolicyLoss",
        "exgrpo_kernels.objective.PolicyObjective",
        "exgrpo_kernels.linear_logprob.linear_logprob",
        "exgrpo_kernels.policy_loss_from_logits.policy_loss_from_logits",
        "exgrpo_kernels.vocab_parallel.vocab_parallel_policy_loss",
        "exgrpo_kernels.vocab_parallel.vocab_parallel_linear_logprob",
    ),
    "Values of a step": (
        "exgrpo_fast.core.types",
        "exgrpo_fast.rollout.engine",
        "exgrpo_fast.experience.replay.protocol",
    ),
    "Replay buffer": (
        "exgrpo_fast.experience.replay.store.ExperienceStore",
        "exgrpo_fast.experience.replay.store.Experiences",
        "exgrpo_fast.experience.replay.recipe.ReplayRecipe",
        "exgrpo_fast.experience.replay.selectors",
    ),
}


def on_config(config: Any) -> Any:
    config.nav = [{"Home": "index.md"}, *reading_order((ROOT / "docs/README.md").read_text())]
    config.nav += [
        {"API": [{title: api_page(title)} for title in API]},
        {"Examples": "examples.md"},
        {"Project": ["contents.md", "contributing.md", "changelog.md", "bench/NOTES.md"]},
    ]
    return config


def reading_order(contents: str) -> list[Any]:
    """The sections of docs/README.md with their pages, then those outside of a section."""
    nav: list[Any] = []
    for block in contents.split("\n\n"):
        pages = [name for _, name, _ in LINK.findall(block) if "/" not in name]
        title = re.fullmatch(r"\*\*(.*)\*\*", block)
        if title:
            nav.append({title[1]: []})
        elif re.match(r"1\. ", block):
            next(iter(nav[-1].values())).extend(pages)
        else:
            nav.extend(pages)
    return nav


def api_page(title: str) -> str:
    return f"api/{title.lower().replace(' ', '-')}.md"


def on_files(files: Files, config: Any) -> Files:
    files.remove(files.src_uris["README.md"])
    pages = {site: source_page(source) for source, site in PAGES.items()}
    pages["bench/NOTES.md"] = source_page("bench/NOTES.md")
    pages["examples.md"] = examples_page()
    for title, names in API.items():
        pages[api_page(title)] = "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
    for site, text in pages.items():
        files.append(File.generated(config, site, content=text))
    files.append(
        File.generated(config, "style.css", content=(ROOT / "docs/site/style.css").read_text())
    )
    known = files.src_uris
    linked = {target for source in sources() for target in linked_files(source)}
    linked |= {f"examples/{path.name}" for path in ROOT.glob("examples/*.ipynb")}
    for target in sorted(linked - known.keys()):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def sources() -> Iterator[str]:
    yield from PAGES
    for path in ROOT.glob("docs/*.md"):
        yield f"docs/{path.name}"


def linked_files(source: str) -> Iterator[str]:
    """Files outside of docs/ that a page leads to and that are no pages."""
    for _, link, _ in LINK.findall((ROOT / source).read_text()):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        path = ROOT / target
        if not target.startswith("docs/") and path.suffix != ".md" and path.is_file():
            yield target


def source_page(source: str) -> str:
    return (ROOT / source).read_text()


def examples_page() -> str:
    parts = [
        "# Examples",
        "Scripts that run as they are, and a notebook, "
        "[quickstart.ipynb](examples/quickstart.ipynb).",
    ]
    for path in sorted(ROOT.glob("examples/*.py")):
        parts += [f"## {path.name}", f"```python\n{path.read_text()}```"]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **other: Any) -> str:
    """Links between files of the repository -> links between pages."""
    site = page.file.src_uri
    source = {site: source for source, site in PAGES.items()}.get(site, f"docs/{site}")
    if site == "bench/NOTES.md":
        source = site
    if site == "examples.md" or site.startswith("api/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        start, link, end = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        place = PAGES.get(target) or FOLDERS.get(target) or target.removeprefix("docs/")
        return f"{start}{posixpath.relpath(place, posixpath.dirname(site) or '.')}{end}"

    return SOURCE.sub(moved, LINK.sub(moved, markdown))


def on_page_content(content: str, **other: Any) -> str:
    """Formulas -> MathML, which browsers draw without a script; breaks for names in tables."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    def breakable(match: re.Match[str]) -> str:
        return re.sub(r"(?<=[\w\]])([._/])(?=\w)", r"\1<wbr>", match[0])

    content = CELL.sub(lambda cell: CODE.sub(breakable, cell[0]), content)
    return FORMULA.sub(drawn, content)
