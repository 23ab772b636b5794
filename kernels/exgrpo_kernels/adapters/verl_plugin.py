"""Loaded by verl through the entry-point group `verl.plugins`: activates the adapter."""

from exgrpo_kernels.adapters import verl

verl.activate()
