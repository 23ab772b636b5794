"""Completions on the page: the best and the worst, early in the run and late, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from exgrpo_fast.core.text import clean_text
from exgrpo_fast.run.display import Row
from exgrpo_fast.run.display.formatting import best_and_worst, number_of, verdict_line
from exgrpo_fast.run.report.reading import Run

COMPLETION_LIMIT = 6_000  # characters of one completion on the page
QUESTION_LIMIT = 1_500


def completions_section(run: Run) -> str:
    """The best and the worst of the first and of the last step that kept them, side by side."""
    if not run.last_completions:
        return ""
    first, last, how = pick_rows(run.first_completions, run.last_completions)
    shown = [best_and_worst(rows) for rows in ([first] if first is last else [first, last])]
    prompts = {str(row.get("prompt")) for side in shown for _, row in side}
    one_question = len(prompts) == 1
    head = _question(shown[0][0][1]) if one_question else ""
    columns = "".join(_column(side, with_questions=not one_question) for side in shown)
    return f"<h2>Completions</h2><p>{how}</p>{head}<div class=sides>{columns}</div>"


def pick_rows(
    first: Sequence[Row], last: Sequence[Row]
) -> tuple[Sequence[Row], Sequence[Row], str]:
    """The rows to compare and how they were picked; never by how good the change looks."""
    if first and last and first[0].get("step") == last[0].get("step"):
        how = "The best and the worst completion of the only step whose completions were kept."
        return last, last, how
    old, new = _by_question(first), _by_question(last)
    shared = [question for question in new if question in old]
    if not shared:
        how = "The best and the worst completion of the first and the last step that kept them."
        return first, last, how
    varied = [q for q in shared if _varied(old[q]) or _varied(new[q])]
    question = (varied or shared)[0]
    return old[question], new[question], "The same question, early and late."


def _by_question(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("question_id") is not None:
            groups.setdefault(str(row["question_id"]), []).append(row)
    return groups


def _varied(rows: Sequence[Row]) -> bool:
    return len({row.get("reward") for row in rows}) > 1


def _column(side: Sequence[tuple[str, Row]], *, with_questions: bool) -> str:
    step = escape(str(side[0][1].get("step", "?")))
    articles = "".join(_article(name, row, with_question=with_questions) for name, row in side)
    return f"<section><h3>step {step}</h3>{articles}</section>"


def _article(name: str, row: Row, *, with_question: bool) -> str:
    advantage = number_of(row, "advantage")
    tail = "" if advantage is None else f" · advantage {advantage:+.2f}"
    question = _question(row) if with_question else ""
    completion = safe_text(row.get("completion"), COMPLETION_LIMIT)
    return (
        f"<article class={name}><h4>{name} <span>{escape(verdict_line(row) + tail)}</span></h4>"
        f"{question}<pre tabindex=0>{completion}</pre></article>"
    )


def _question(row: Row) -> str:
    prompt, answer = (safe_text(row.get(key), QUESTION_LIMIT) for key in ("prompt", "answer"))
    return f"<p class=prompt tabindex=0>{prompt}</p><p class=prompt>Expected answer: {answer}</p>"


def safe_text(value: object, limit: int) -> str:
    """Any text as HTML: cleaned, escaped, and cut in the middle above `limit` characters."""
    safe = clean_text("" if value is None else value).strip()
    if len(safe) > limit:
        gone = len(safe) - limit
        safe = f"{safe[: limit // 2]}\n… {gone} characters …\n{safe[-(limit // 2) :]}"
    return escape(safe)
