"""Resampling of critical tokens from a prior policy (EAPO)."""
