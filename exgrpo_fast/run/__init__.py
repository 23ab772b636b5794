"""A run on disk and on screen: its directory, metrics, checkpoints, display and report."""
