"""The reward pool: worker processes that are killed when they exceed their time."""
