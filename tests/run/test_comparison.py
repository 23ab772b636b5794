"""The page of several runs, and `exgrpo-fast report`."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from conftest import exit_code
from report_runs import Page, make_run

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.run.directory import RunFolder, is_written
from exgrpo_fast.run.report import make_page, read_run, read_runs, write_report
from exgrpo_fast.run.report.headline import status
from exgrpo_fast.run.report.reading import distinct_names
from exgrpo_fast.run.report.svg import Measured, change_figure, line_figure


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """exgrpo; one without replay and of another learning rate; one that stopped at step 5 of 20."""
    folders = [tmp_path / name for name in ("exgrpo", "plain", "stopped")]
    for folder, steps in zip(folders, (20, 20, 5), strict=True):
        folder.mkdir()
        make_run(folder, steps=steps, replay=folder.name != "plain")
    config = "method: {}\nmodel: {{name: org/model}}\ntrain: {{lr: {}, max_steps: 20}}\n"
    (folders[0] / "config.yaml").write_text(config.format("exgrpo", "1.0e-06"))
    (folders[1] / "config.yaml").write_text(config.format("on-policy", "2.0e-06"))
    (folders[2] / "config.yaml").write_text(config.format("exgrpo", "1.0e-06"))
    summary = json.loads((folders[2] / "summary.json").read_text())
    (folders[2] / "summary.json").write_text(json.dumps({"eval_before": summary["eval_before"]}))
    return folders


def figures(html: str) -> dict[str, dict[str, list[list[float]]]]:
    """title -> name -> points, as the page's script reads them."""
    found = {}
    for figure in html.split("<figure data-hover=")[1:]:
        title = unescape(figure.split("<h3>")[1].split("</h3>")[0])
        found[title] = dict(json.loads(unescape(figure.split('"')[1]))["s"])
    return found


def test_a_figure_has_a_curve_of_each_run_that_measures_it(three) -> None:
    found = figures(make_page(three))
    reward = found["Mean reward"]
    assert list(reward) == ["exgrpo", "plain", "stopped"]
    assert reward["exgrpo"][0] == [1, 0.201] and len(reward["stopped"]) == 5
    assert list(found["Groups with a replayed trajectory"]) == ["exgrpo", "stopped"]
    assert found["Share of the groups: none correct"]["plain"][3] == [4, 0.3]
    assert found["Held-out accuracy by step"] == {
        "exgrpo": [[0, 0.2], [20, 0.5]],
        "plain": [[0, 0.2], [20, 0.5]],
        "stopped": [[0, 0.2]],
    }


def test_results_stand_beside_each_other_with_their_intervals(three) -> None:
    text = Page(make_page(three)).text.replace("\u00a0", " ")
    assert "exgrpo2020.0 % [18.0, 22.0]50.0 % [47.0, 53.0]+30.0 points" in text
    assert "stopped5 of 2020.0 % [18.0, 22.0]0.205" in text  # neither after nor change


def test_only_what_differs_is_listed(three) -> None:
    text = Page(make_page(three)).text
    differing = text.split("What differs")[1]
    assert "methodexgrpoon-policyexgrpo" in differing
    assert "train.lr1e-062e-061e-06" in differing
    assert "model.name" not in differing and "max_steps" not in differing
    assert differing.endswith("EnvironmentNo difference.\n")


def test_runs_of_one_folder_name_are_told_apart() -> None:
    paths = [Path("/a/x/out"), Path("/a/y/out"), Path("/a/y/other")]
    assert distinct_names(paths) == ["x/out", "y/out", "y/other"]
    assert distinct_names(paths[:1]) == ["out"]


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    folders = [tmp_path / "<b>one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        make_run(folder)
    (folders[0] / "config.yaml").write_text("method: <script>alert(1)</script>\n")
    page = Page(make_page(folders))
    assert "b" not in page.tags and page.tags.count("script") == 1
    assert "<b>one" in page.text and "alert(1)" in page.text


def test_a_figure_of_changes_says_what_it_shows() -> None:
    drawn = change_figure(
        "t", [("a", Measured(0.1, (0.05, 0.2)), Measured(0.5)), ("b", None, None)]
    )
    assert 'aria-label="t; a before 10.0 %; a after 50.0 %"' in drawn
    assert change_figure("t", [("a", None, None)]) == ""


def test_a_figure_can_be_heard(three) -> None:
    html = make_page(three[:1])
    assert "Reward and pass@1; reward from 0.201 at step 1 to 0.22 at step 20;" in html
    assert line_figure("t", []) == ""


# --- the state of a run ---------------------------------------------------------------------------


def text_of(html: str) -> str:
    return Page(f"<div>{html}</div>").text


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    assert not is_written(tmp_path)
    folder = RunFolder(tmp_path, resume=True)
    assert is_written(tmp_path)
    make_run(tmp_path, steps=3)
    (tmp_path / "config.yaml").write_text("train: {max_steps: 20}\n")
    run = read_run(tmp_path)
    assert text_of(status(run, live=True)) == "running · step 3 of 20 · 30 s a step"
    assert re.search(r"a step · at 20\d\d-\d\d-\d\d \d\d:\d\d$", text_of(status(run, live=False)))
    assert "stopped · step 3 of 20" in write_report(tmp_path).read_text().replace("</b>", "")
    folder.close()
    assert not is_written(tmp_path)
    assert text_of(status(read_run(tmp_path), live=False)) == "stopped · step 3 of 20"
    (tmp_path / "config.yaml").write_text("train: {max_steps: 3}\n")
    assert status(read_run(tmp_path), live=False) == ""


def test_without_a_table_of_locks_the_process_decides(tmp_path: Path, monkeypatch) -> None:
    import builtins
    import socket

    real = builtins.open

    def no_table(path, *arguments, **options):
        if path == "/proc/locks":
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", no_table)
    folder = RunFolder(tmp_path, resume=True)
    assert is_written(tmp_path)
    folder.close()
    (tmp_path / ".lock").write_text(f"process 4194304 on {socket.gethostname()}\n")  # none has it
    assert not is_written(tmp_path)
    (tmp_path / ".lock").write_text("process 1 on another-host\n")
    assert not is_written(tmp_path)


# --- the command ----------------------------------------------------------------------------------


def test_report_writes_into_the_run_or_where_it_is_told(three, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("report", three[2]) == 0
    assert "stopped · step 5 of 20" in Page((three[2] / "report.html").read_text()).text
    assert exit_code("report", *three) == 0
    assert "3 runs" in (tmp_path / "comparison.html").read_text()
    assert exit_code("report", three[0], "--out", "page.html") == 0
    assert not (three[0] / "report.html").exists()
    assert capsys.readouterr().out == f"{three[2] / 'report.html'}\ncomparison.html\npage.html\n"


def test_a_torn_last_line_is_left_out(three) -> None:
    with (three[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "reward_m')
    assert [run.last_step for run in read_runs(three)] == [20, 20, 5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("report", "report: the following arguments are required: RUN"),
        ("report nowhere", "there is no run 'nowhere'"),
        ("report .", "'.' is no run directory: it has no config.yaml or metrics.jsonl"),
        ("report fresh", "fresh has no metrics yet: no step of it has finished"),
        ("report plain fresh", "fresh has no metrics yet: no step of it has finished"),
        ("report plain ./plain", "plain is given twice"),
        ("report plain --out plain", "--out plain: Is a directory"),
        ("report plain --out no/page.html", "--out no/page.html: No such file or directory"),
        ("report plain --uot x", "report: unknown argument '--uot'; did you mean '--out'?"),
        ("watch nowhere", "there is no run 'nowhere'"),
        ("watch plain --port 65536", "port 65536: bind(): port must be 0-65535."),
    ],
)
def test_mistakes_are_one_line(three, tmp_path, monkeypatch, capsys, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.yaml").write_text("method: exgrpo\n")
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(*words.split()) == 2
    assert capsys.readouterr() == ("", f"exgrpo-fast: {said}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="7 runs are too many for one page: at most 6"):
        make_page([tmp_path / str(number) for number in range(7)])


def test_without_arguments_the_command_says_what_to_do_first(capsys) -> None:
    assert exit_code() == 0
    shown = capsys.readouterr().out
    assert "exgrpo-fast doctor" in shown and "exgrpo-fast train quickstart" in shown
    assert max(map(len, shown.splitlines())) <= 60
