"""Files around the code name what is there: container, issue form, workflow, version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from exgrpo_fast import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_the_container_copies_what_is_there_and_not_ignored() -> None:
    text = (ROOT / "Containerfile").read_text()
    copied = [
        name for line in re.findall(r"^COPY (.*) /src\S*$", text, re.M) for name in line.split()
    ]
    assert {"pyproject.toml", "exgrpo_fast", "kernels"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = {line.removeprefix("!") for line in (ROOT / ".containerignore").read_text().split()}
    assert set(copied) <= kept

    extras = {e for line in re.findall(r"extras=(\S+)", text) for e in line.split(",")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "train" in extras and extras <= project["optional-dependencies"].keys()


def test_the_issue_form_asks_for_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    fields = {part["id"]: part for part in form["body"]}
    assert "exgrpo-fast doctor --json" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]
    assert len(fields) == len(form["body"])


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == ".ci/run"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "exgrpo_fast/__init__.py"
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == __version__
