"""Revision of failed completions in hindsight (HeRL)."""
