"""Lines for people: wrapped on a terminal, whole in a pipe."""

from __future__ import annotations

import pytest

from exgrpo_fast.cli import output

LINE = (
    "WRONG  truncation: 41% of completions reach the length limit -> rollout.max_completion_tokens"
)


def test_a_pipe_gets_whole_lines(capsys) -> None:
    output.print_lines(f"{LINE}\n\nshort")
    assert capsys.readouterr().out.splitlines() == [LINE, "", "short"]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_terminal_gets_lines_that_fit(width: int, capsys, monkeypatch) -> None:
    monkeypatch.setattr(output, "terminal_width", lambda: width)
    output.print_lines(LINE, indent=" " * 7)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and len(lines) > 1
    assert " ".join(line.strip() for line in lines) == LINE
    assert all(line.startswith(" " * 7) for line in lines[1:])
