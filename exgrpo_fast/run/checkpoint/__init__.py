"""Checkpoints: their format, the writer beside training, and shards of several ranks."""
