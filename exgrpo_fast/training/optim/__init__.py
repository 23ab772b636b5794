"""Optimisers, schedules and gradient release."""
