"""Rollouts by the transformers model that is trained."""
