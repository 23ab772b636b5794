"""Text from anywhere -> text that a page may hold."""

from __future__ import annotations

from html import escape

from exgrpo_fast.core.text import clean_text


def safe_text(value: object, limit: int) -> str:
    """Cleaned, escaped, and cut in the middle when longer than `limit` characters."""
    safe = clean_text("" if value is None else value).strip()
    if len(safe) > limit:
        gone = len(safe) - limit
        safe = f"{safe[: limit // 2]}\n… {gone} characters …\n{safe[-(limit // 2) :]}"
    return escape(safe)
