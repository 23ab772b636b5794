"""report.html: right numbers, nothing from outside, and no run too broken for it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from report_runs import Page, make_run, rows, step_metrics

import exgrpo_fast
from exgrpo_fast.run.report import read_run, write_report
from exgrpo_fast.run.report.completions import pick_rows
from exgrpo_fast.run.report.reading import flat
from exgrpo_fast.run.report.svg import (
    Axes,
    Line,
    line_figure,
    running_mean,
    stacked_figure,
    thin,
    tick_label,
    ticks,
)
from exgrpo_fast.run.sinks import CompletionLog, JsonlSink


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


# --- what it says --------------------------------------------------------------------------------


def test_the_headline_tells_before_and_after(tmp_path):
    text = page(make_run(tmp_path)).text.replace("\u00a0", " ")
    assert "exgrpo · org/model" in text
    assert "held-out avg@820.0 % → 50.0 %" in text
    assert "held-out pass@850.0 % → 75.0 %" in text
    assert "Held-out accuracy rose by 30.0 points on 256 questions." in text
    assert "(18.0 % to 22.0 % before, 47.0 % to 53.0 % after) do not touch." in text
    assert "steps20" in text
    assert "wall time10m20" in text
    assert "peak memory15.2 GiB" in text
    assert "tokens generated20.0k" in text


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ({"avg_at_n": 0.21, "avg_at_n_low": 0.19, "avg_at_n_high": 0.23}, "chance alone may"),
        ({"avg_at_n": 0.1, "avg_at_n_low": 0.08, "avg_at_n_high": 0.12}, "fell by 10.0 points"),
        ({"avg_at_n": 0.2}, "did not move"),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(tmp_path, after, says):
    make_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"eval_after": after}))
    assert says in page(tmp_path).text


def test_the_headline_says_how_many_groups_teach_nothing(tmp_path):
    make_run(tmp_path, steps=12)
    path = tmp_path / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    for step in steps:
        early = step["step"] <= 5
        step |= {"learnable_frac": 0.12, "pass_at_1_fresh": 0.02} if early else {}
        step |= {"learnable_frac": 0.7, "pass_at_1_fresh": 0.6} if step["step"] > 7 else {}

    def text(lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return page(tmp_path).text.replace("\u00a0", " ")

    assert (
        "In the first 5 steps, 2 % of completions are correct and 88 % of groups carry no gradient. "
        "In the last 5, 60 % of completions are correct and 30 % of groups carry no gradient."
        in text(steps)
    )
    assert "In the first step, 2 % of completions are correct" in text(steps[:1])
    assert "carry no gradient" not in text([{"step": 1}])


def test_every_curve_is_there(tmp_path):
    titles = page(make_run(tmp_path)).titles
    for title in (
        "Reward and pass@1", "Groups by outcome", "Entropy", "Completion length",
        "Truncated share", "Reasons of the rewards", "Questions in the replay buffer", "Replay buckets",
        "Ages of stored trajectories", "Importance ratio of replayed tokens",
        "Seconds per step, by phase", "Gradient norm", "step 1", "step 20",
    ):  # fmt: skip
        assert title in titles


def series(folder, title):
    """name -> [[step, value], ...] of a figure, as its script reads them."""
    html = write_report(folder).read_text(encoding="utf-8")
    figure = next(f for f in html.split("<figure ")[1:] if f"<h3>{title}</h3>" in f)
    return dict(json.loads(unescape(figure.split('"')[1]))["s"]), figure


def test_groups_of_partial_rewards_are_counted_once(tmp_path):
    make_run(tmp_path, steps=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows[1]["all_fail_frac"] = 0.4  # a tenth of the groups differ in their rewards, none is right
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares, drawn = series(tmp_path, "Groups by outcome")
    assert [y for _, y in shares["none correct"]] == pytest.approx([0.3, 0.3, 0.3])
    assert ">1<" in drawn and ">1.5<" not in drawn


def test_replay_figures_hold_the_counts_of_each_step(tmp_path):
    make_run(tmp_path, steps=3)
    buckets, drawn = series(tmp_path, "Replay buckets")
    assert buckets == {
        "1/4": [[1, 1], [2, 2], [3, 3]],
        "2/4": [[1, 0], [2, 0], [3, 0]],
        "3/4": [[1, 2], [2, 4], [3, 6]],
    }
    assert "darkest: 6 questions" in drawn
    ages, drawn = series(tmp_path, "Ages of stored trajectories")
    assert ages == {
        "0": [[1, 4], [2, 4], [3, 4]],
        "1+": [[1, 1], [2, 2], [3, 3]],
        "2+": [[1, 0], [2, 0], [3, 0]],
        "4+": [[1, 5], [2, 10], [3, 15]],
    }
    assert "darkest: 15 trajectories" in drawn
    ratios, _ = series(tmp_path, "Importance ratio of replayed tokens")
    assert ratios["99th percentile"] == [[1, 3.5], [2, 3.5], [3, 3.5]]


def test_buckets_of_continuous_rewards_include_both_ends(tmp_path):
    make_run(tmp_path, steps=1)
    (tmp_path / "config.yaml").write_text("replay: {difficulty: reward_std}\n")
    buckets, _ = series(tmp_path, "Replay buckets")
    assert buckets == {"0/2": [[1, 1]], "1/2": [[1, 0]], "2/2": [[1, 2]]}


def test_without_replay_there_is_no_replay_section(tmp_path):
    found = page(make_run(tmp_path, replay=False))
    assert "Replay buckets" not in found.titles
    assert "Experience replay" not in found.text


def test_the_page_is_self_contained_and_safe(tmp_path):
    path = write_report(make_run(tmp_path))
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert found.addresses == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert found.tags.count("script") == 1
    assert "alert(1)" in found.text  # shown, and not run
    assert "\\e[2J" in found.text
    assert "\x1b" not in html
    assert list(tmp_path.glob(".report*")) == []


def test_the_script_is_the_one_that_the_policy_admits(tmp_path):
    import base64
    import hashlib

    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    script = html.split("<script>")[1].split("</script>")[0]
    tag = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{tag}'" in html


def test_completions_compare_the_same_question():
    early = rows(0.0, question="a") + rows(0.0, question="b")
    late = rows(0.0, question="c") + rows(1.0, question="b") + rows(0.0, question="a")
    for step, table in ((1, early), (9, late)):
        for row in table:
            row["step"] = step
    first, last, how = pick_rows(early, late)
    assert {row["question_id"] for row in [*first, *last]} == {"b"}  # the one whose rewards vary
    assert how.startswith("The same question")
    other = [dict(row, question_id="z") for row in late]
    assert pick_rows(early, other)[:2] == (early, other)
    assert pick_rows(late, late)[0] is pick_rows(late, late)[1]


# --- broken and unusual runs ---------------------------------------------------------------------


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "No step has finished yet." in page(tmp_path).text


def test_one_step_gives_a_page(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, step_metrics(1, replay=False))
    found = page(tmp_path)
    assert "One step has finished, with a mean reward of 0.201." in found.text
    assert "circle" in found.tags  # a lone point is drawn as a point


def test_torn_and_strange_files_are_skipped(tmp_path):
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\nnot json\n{"no": "step"}\n{"step": "x"}\n\xff\xfe\n{"step": 21, "rew')
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "env.json").write_text("[]")
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "completions" / "step_000099.parquet").write_bytes(b"PAR1 no")
    run = read_run(tmp_path)
    assert [step["step"] for step in run.steps] == list(range(1, 21))
    assert (run.config, run.environment, run.summary) == ({}, {}, {})
    assert run.last_completions[0]["step"] == 20
    assert "training reward" in page(tmp_path).text


def test_strange_values_are_skipped(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    strange = {
        "reward_mean": None,
        "entropy": "x",
        "lr": 10**400,
        "replay_buckets": [None, "a", 3],
        "reasons": 5,
    }
    sink.log(1, strange | {"replay_size": 1})
    sink.log(2, {"replay_buckets": [1], "reasons": {"ok": None, "x<y": 2}, "replay_size": 2})
    (tmp_path / "summary.json").write_text('{"eval_before": 3, "eval_after": {"avg_at_n": null}}')
    assert "x<y" in page(tmp_path).text


def test_a_repeated_step_counts_once_and_the_last_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "x": 1}\n{"step": 1}\n{"step": 2, "x": 5}\n')
    assert read_run(tmp_path).series("x") == [(2, 5.0)]
    assert [step["step"] for step in read_run(tmp_path).steps] == [1, 2]


def test_a_long_run_is_quick_and_small(tmp_path):
    make_run(tmp_path, steps=1000)
    started = time.perf_counter()
    path = write_report(tmp_path)
    assert time.perf_counter() - started < 5
    assert path.stat().st_size < 2_000_000


def test_huge_completions_are_cut(tmp_path):
    CompletionLog(tmp_path / "completions").write(1, rows(1.0, text="word " * 200_000))
    assert write_report(tmp_path).stat().st_size < 100_000


# --- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "inside", "outside"),
    [
        (0, 1, [0, 0.5, 1], [0, 0.5, 1]),
        (0, 0.3, [0, 0.1, 0.2, 0.3], [0, 0.1, 0.2, 0.3]),
        (0, 0.97, [0, 0.5], [0, 0.5, 1]),
        (3, 41, [10, 20, 30, 40], [0, 10, 20, 30, 40, 50]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1], [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low, high, inside, outside):
    assert ticks(low, high, 4) == inside
    assert ticks(low, high, 4, outside=True) == outside


def test_axes_map_the_range_onto_the_figure():
    axes = Axes([0, 100], [0.0, 1.0], zero=True, top=None)
    assert (axes.x(0), axes.x(100)) == (46, 548)
    assert (axes.y(0), axes.y(1)) == (210, 10)
    assert tick_label(20_000) == "20k"
    assert tick_label(0.05) == "0.05"
    assert [tick_label(v) for v in (1.5e-4, -2e-6, 1e-3, 0)] == ["1.5e-4", "-2e-6", "0.001", "0"]


def test_constant_and_tiny_data_can_be_drawn():
    for low, high in ((0.0, 0.0), (-3.0, -3.0), (1e-14, 2e-14), (1e12, 1e12 + 1e-3), (-1e-9, 0.0)):
        for zero in (True, False):
            figure = line_figure("t", [Line("l", [(1, low), (2, high)], 1)], zero=zero)
            assert "nan" not in figure
            assert 'class="s1"' in figure
    assert line_figure("t", [Line("l", [], 1)]) == ""
    assert stacked_figure("t", [("zero", [(1, 0.0)], 1)]) == ""


def test_thinning_and_smoothing_keep_the_mean():
    points = [(float(i), math.sin(i)) for i in range(10_007)]
    thinned = thin(points, 400)
    assert len(thinned) == 400
    assert sum(x for x, _ in thinned) / 400 == pytest.approx(5003, rel=1e-3)
    assert thin(points[:5]) == points[:5]
    line = [(float(i), 2.0 * i) for i in range(200)]
    assert running_mean(line)[100] == pytest.approx((100.0, 200.0))


def test_flat_keeps_order_and_names():
    assert flat({"a": {"b": 1, "c": [1]}, "d": True}) == [("a.b", 1), ("a.c", "[1]"), ("d", "true")]


def test_the_report_needs_no_torch():
    code = "import sys, exgrpo_fast.run.report; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(exgrpo_fast.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=environment).returncode == 0
