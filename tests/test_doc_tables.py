"""The tables of the pages say what the files of bench/results/ say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import exit_code

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("doc_tables", ROOT / "bench" / "doc_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


doc_tables = load_script()


@pytest.mark.parametrize("table", doc_tables.TABLES, ids=lambda table: table.rows.__name__)
def test_every_row_stands_in_its_page(table: Any) -> None:
    rows = doc_tables.markdown(table.rows(doc_tables.load(table.file))).splitlines()
    assert len(rows) > 3
    page = (ROOT / table.page).read_text().splitlines()
    start = page.index(rows[0])
    assert page[start : start + len(rows)] == rows
    assert not page[start + len(rows)].startswith("|")  # the page has no row more


def test_every_result_says_how_it_is_made_again() -> None:
    folder = ROOT / "bench" / "results"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.json")}
    assert files == set(doc_tables.COMMANDS)
    for command in doc_tables.COMMANDS.values():
        words = command.split()
        if words[0] == "python":
            assert (ROOT / words[1]).exists(), command
    assert {table.file for table in doc_tables.TABLES} <= doc_tables.COMMANDS.keys()


def test_the_command_prints_one_table_or_a_list(capfd) -> None:
    def printed(*words: str) -> tuple[int, str, str]:
        return exit_code("results", *words), *capfd.readouterr()

    code, out, _ = printed("packing")
    assert code == 0 and "again: python bench/packing.py" in out
    assert "| 64 | 64 | 0.49 | 0.59 |" in out.splitlines()
    code, out, _ = printed()
    assert code == 0 and len(out.splitlines()) == 2 * len(doc_tables.COMMANDS)
    assert out.splitlines()[1].strip() == doc_tables.COMMANDS["scale_model.json"]
    code, out, err = printed("pack")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert sys.modules.get("doc_tables") is None  # the script is no part of the package


@pytest.mark.parametrize("width", [60, 80])
def test_the_list_and_the_tables_fit_a_terminal(width: int, capsys) -> None:
    listed = doc_tables.overview(width)
    assert max(map(len, listed.splitlines())) <= width
    for command in doc_tables.COMMANDS.values():  # as a shell joins the lines
        assert command in re.sub(r" \\\n +", " ", listed)
    for table in doc_tables.TABLES:
        rows = table.rows(doc_tables.load(table.file))
        doc_tables.show(rows, width)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        cells = "".join(cell for row in rows for cell in row)
        assert sorted("".join(shown.split())) == sorted("".join(cells.split())), (
            table.file
        )  # none is cut
