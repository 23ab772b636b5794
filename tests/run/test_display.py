"""What a reader sees: plain lines off a terminal, a live table on one."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from rich.console import Console

from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.display.columns import COLUMNS, fitting_columns
from exgrpo_fast.run.display.formatting import duration, excerpt, short, sparkline
from exgrpo_fast.run.display.live import RichScreen, make_screen
from exgrpo_fast.run.display.plain import PlainScreen
from exgrpo_fast.run.display.steps import StepReader, plain_line

FULL = {
    "step": 12,
    "loss": 0.123456,
    "reward_mean": 0.41,
    "pass_at_1": 0.4,
    "learnable_frac": 0.58,
    "replay_frac": 0.31,
    "replay_size": 40,
    "entropy": 0.84,
    "completion_len_mean": 811.6,
    "truncated_frac": 0.04,
    "tokens_per_second_rollout": 24100.0,
    "seconds_rollout": 19.2,
    "tokens_per_second_train": 31800.0,
    "seconds_update": 14.0,
    "step_seconds": 36.0,
    "peak_memory_gib": 15.21,
    "skipped": 0,
}

ROWS = [
    {"prompt": "2 + 2 [bold]", "answer": "4", "completion": "so 4", "reward": 1.0, "reason": "ok"},
    {"completion": "five \x1b[2J[red]", "reward": 0.0, "reason": "wrong", "truncated": True},
    {"completion": "between", "reward": 0.5, "source": "replay", "num_tokens": 3},
]


class Ticking:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain(**options):
    stream = io.StringIO()
    return PlainScreen(stream, **options), stream


def rich_screen(width=140, height=30):
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, width=width, height=height, color_system=None,
        highlight=False, legacy_windows=False,
    )  # fmt: skip
    return RichScreen(console), stream


def visible(stream):
    """What remains on a terminal: control sequences obeyed as far as a live region uses them."""
    screen: list[str] = [""]
    row = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", stream.getvalue()):
        if part == "\n":
            row += 1
            if row == len(screen):
                screen.append("")
        elif part == "\x1b[2K":
            screen[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", part):
            row -= int(match[1] or 1)
        elif part and part != "\r" and not part.startswith("\x1b"):
            screen[row] = part
    return [line.rstrip() for line in screen]


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1m00"), (95, "1m35"),
     (3599.6, "1h00"), (6720, "1h52"), (190_000, "2d04h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (811.6, "812"), (999.6, "1.0k"), (24_100, "24.1k"), (999_960, "1.00M"),
     (1_310_000, "1.31M"), (2.5e9, "2.50G"), (-1500, "-1.5k")],
)  # fmt: skip
def test_short_numbers(number, text):
    assert short(number) == text


def test_sparkline_spans_lowest_to_highest():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([3, 3]) == "▁▁"
    assert len(sparkline(range(100), width=10)) == 10


def test_excerpt_keeps_both_ends():
    text = excerpt("begin " + "x" * 5000 + " end", limit=100)
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "… 4910 characters …" in text
    assert excerpt("\n".join(map(str, range(100))), lines=4).split("\n")[:2] == ["0", "1"]
    assert excerpt("short") == "short"


# --- one step ------------------------------------------------------------------------------------


def test_the_plain_line_in_full():
    reader = StepReader(Ticking())
    reader.read({"step": 11, "reward_mean": 0.39, "step_seconds": 36.0}, 200)
    reader._clock.now = 36.0
    line = reader.read(FULL, 200)
    assert plain_line(line) == (
        "step 12/200 · reward 0.410 (+0.020) · pass@1 0.400 · learnable 58 % · replay 31 % · "
        "entropy 0.840 · len 812 (cut 4 %) · rollout 24.1k tok/s 19 s · train 31.8k tok/s 14 s · "
        "peak 15.2 GiB · eta 1h52"
    )


def test_missing_keys_are_left_out():
    line = StepReader(Ticking()).read({"step": 1, "reward_mean": float("nan"), "entropy": None}, 5)
    assert plain_line(line) == "step 1/5"


def test_plain_grpo_shows_no_replay_and_a_skipped_update_is_told():
    metrics = {**FULL, "replay_frac": 0.0, "replay_size": 0, "skipped": 1}
    line = plain_line(StepReader(Ticking()).read(metrics, 200))
    assert "replay" not in line
    assert "update skipped" in line


def test_eta_follows_the_wall_clock_between_steps():
    clock = Ticking()
    reader = StepReader(clock)
    assert reader.read({"step": 1, "step_seconds": 10.0}, 11).eta == 100.0
    clock.now = 30.0  # an evaluation came between: 30 s for a step of 10
    assert reader.read({"step": 2, "step_seconds": 10.0}, 11).eta == pytest.approx(20.0 * 9)


# --- off a terminal ------------------------------------------------------------------------------


def test_plain_screen_prints_one_line_a_step():
    screen, stream = plain(clock=Ticking())
    screen.step(FULL, total_steps=200)
    evaluated = {**FULL, "step": 13, "eval_avg_at_n": 0.5, "eval_pass_at_k": {"1": 0.5, "8": 0.75}}
    screen.step(evaluated, total_steps=200)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 12/200 · reward 0.410 · pass@1 0.400 · learnable 58 %")
    assert lines[2] == "step 13/200 · held-out avg@n 0.500 · pass@8 0.750"
    assert "loss" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_quick_phase_says_nothing():
    screen, stream = plain()
    with screen.phase("rollout", total=2) as advance:
        advance()
        advance(1)
    assert stream.getvalue() == ""


def test_a_slow_phase_speaks_the_first_time_only():
    screen, stream = plain(first_after=0.02, again_after=30.0)
    for _ in range(2):
        with screen.phase("rollout", total=4) as advance:
            advance(2)
            time.sleep(0.1)
            advance(2)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"rollout · 2/4 · \d\.\d s · \d\.\d s left", lines[0])
    assert lines[1] == "rollout · done · 4 in 0.1 s"


def test_a_very_slow_phase_gives_signs_of_life():
    screen, stream = plain(first_after=0.02, again_after=0.02)
    with screen.phase("load model"):
        deadline = time.monotonic() + 5
        while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stream.getvalue().count("load model · 0.") >= 3


def test_an_error_passes_through_a_phase():
    screen, stream = plain(first_after=0.01)
    with pytest.raises(KeyError), screen.phase("rollout"):
        time.sleep(0.05)
        raise KeyError
    assert "done" not in stream.getvalue()


def test_plain_completions_show_best_and_worst():
    screen, stream = plain()
    screen.completions(ROWS)
    assert stream.getvalue().splitlines() == [
        "question · 2 + 2 [bold]",
        "answer · 4",
        "best · reward 1.00 (ok)",
        "    | so 4",
        "worst · reward 0.00 (wrong) · cut at the limit",
        "    | five \\e[2J[red]",
    ]


def test_printing_never_ends_a_run():
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    PlainScreen(ascii_stream).note("√2 \x1b[2J")
    assert ascii_stream.buffer.getvalue() == b"\\u221a2 \\e[2J\n"
    closed = io.StringIO()
    closed.close()
    PlainScreen(closed).note("nobody reads this")


# --- on a terminal -------------------------------------------------------------------------------


def test_rich_screen_shows_an_aligned_table():
    screen, stream = rich_screen()
    for step in (1, 2):
        screen.step({**FULL, "step": step, "reward_mean": 0.4 + step / 100}, total_steps=200)
    screen.close()
    header, first, second = (line for line in visible(stream) if line)
    names = (
        "step reward ± pass@1 learnable entropy tok/s train tok/s replay length cut time GiB eta"
    )
    assert header.split() == names.split()
    assert first.split()[:6] == ["1/200", "0.410", "–", "0.400", "58", "%"]
    assert second.split()[:6] == ["2/200", "0.420", "+0.010", "0.400", "58", "%"]
    for name, value in (("reward", "0.420"), ("entropy", "0.840"), ("tok/s", "24.1k")):
        assert header.index(name) + len(name) == second.index(value) + len(value)


def test_rich_screen_loses_and_repeats_no_step():
    screen, stream = rich_screen(height=16)
    for step in range(1, 31):
        with screen.phase("rollout", total=4) as advance:
            advance(4)
        screen.step({**FULL, "step": step}, total_steps=30)
        if step == 7:
            screen.note("checkpoint saved")
        if step == 20:
            screen.completions(ROWS)
    screen.close()
    lines = visible(stream)
    shown = [int(m[1]) for line in lines if (m := re.match(r" +(\d+)/30 ", line))]
    assert shown == list(range(1, 31))
    order = [i for i, line in enumerate(lines) if re.match(r" +(7|8)/30|checkpoint saved", line)]
    assert "checkpoint saved" in lines[order[1]]  # between step 7 and step 8


def test_rich_screen_draws_the_phase_while_it_runs():
    screen, stream = rich_screen()
    screen.step(FULL, total_steps=200)
    with screen.phase("rollout [x]", total=512) as advance:
        advance(128)
        deadline = time.monotonic() + 5
        while "128/512" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        live = visible(stream)
    assert any("rollout [x]" in line or "128/512" in line for line in live)
    assert "step 12/200" in stream.getvalue()
    assert "6 %" in stream.getvalue()
    screen.close()
    assert not any("512" in line for line in visible(stream))  # the live region leaves nothing


def test_rich_screen_shows_completions_as_written():
    screen, stream = rich_screen()
    screen.completions(ROWS)
    screen.close()
    text = stream.getvalue()
    assert "2 + 2 [bold]" in text  # not taken for markup
    assert "five \\e[2J[red]" in text  # nor obeyed by the terminal
    assert "best · reward 1.00 (ok)" in text
    assert "between" not in text


def test_a_narrow_terminal_keeps_what_matters():
    titles = [column.title for column in fitting_columns(60)]
    assert titles[:2] == ["step", "reward"]
    assert {"pass@1", "learnable", "entropy", "tok/s"} <= set(titles)
    assert "train tok/s" not in titles
    assert sum(column.width + 2 for column in fitting_columns(60)) - 2 <= 60
    assert len(fitting_columns(200)) == len(COLUMNS)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_live_region_fits_the_terminal(width):
    screen, stream = rich_screen(width)
    for step in (11, 12):
        screen.step({**FULL, "step": step, "skipped": step == 12}, total_steps=200)
    clock = screen._progress.get_time = Ticking()
    with screen.phase("rollout", total=512) as advance:
        for clock.now in (1.0, 2.0):
            advance(64)
        drawn = screen.console.render_lines(screen, pad=False)
    lines = ["".join(segment.text for segment in line).rstrip() for line in drawn]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)  # nothing is cut
    run, phase, header, *rows = lines
    assert run.startswith("step 12/200 ━") and " 6 % · eta " in run
    assert ("reward" in run) == (width >= 80)
    assert "rollout" in phase and "128/512" in phase and phase.endswith("left")
    assert header.split()[:2] == ["step", "reward"]
    assert [row.split()[:2] for row in rows] == [["!", "12/200"]]  # step 11 has scrolled
    screen.close()


def test_a_skipped_update_is_marked():
    screen, stream = rich_screen()
    for step in (12, 13):
        screen.step({**FULL, "step": step, "skipped": 1}, total_steps=200)
    screen.close()
    text = stream.getvalue()
    assert "! 12/200" in text and "! 13/200" in text
    assert text.count("update skipped") == 1  # says what the mark means


def test_an_evaluation_stays_in_the_scrollback():
    screen, stream = rich_screen()
    metrics = {**FULL, "eval_avg_at_n": 0.5, "eval_pass_at_k": {"1": 0.5, "8": 0.75}}
    screen.step(metrics, total_steps=200)
    screen.close()
    assert "step 12 · held-out avg@n 0.500 · pass@8 0.750" in visible(stream)


def test_closing_twice_or_unused_is_fine():
    for screen in (rich_screen()[0], plain()[0], Screen()):
        screen.close()
        screen.close()


def test_null_screen_does_nothing():
    screen = Screen()
    with screen.phase("rollout", total=3) as advance:
        advance(3)
    screen.step(FULL, total_steps=3)
    screen.completions(ROWS)
    screen.note("hush")


# --- the choice ----------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self):
        return True


def test_the_screen_fits_the_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert isinstance(make_screen(io.StringIO()), PlainScreen)
    assert isinstance(make_screen(Terminal("latin-1")), PlainScreen)
    screen = make_screen(Terminal())
    assert isinstance(screen, RichScreen)
    assert not screen.console.no_color
    monkeypatch.setenv("NO_COLOR", "1")
    screen = make_screen(Terminal())
    assert isinstance(screen, RichScreen)
    assert screen.console.no_color
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_screen(Terminal()), PlainScreen)


def test_a_note_of_a_signal_in_the_middle_of_a_line_waits_for_nobody() -> None:
    """The handler runs in the thread that is printing: a plain lock would never be free again."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if text == "first\n":
                screen.note("stopping")
            return super().write(text)

    stream = Interrupted()
    screen = PlainScreen(stream)
    printing = threading.Thread(target=screen.note, args=("first",), daemon=True)
    printing.start()
    printing.join(5.0)
    assert not printing.is_alive() and stream.getvalue() == "stopping\nfirst\n"
