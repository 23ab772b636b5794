"""Checkpoints: their format, and the background writer."""
