"""Where trajectories come from. A new method is a new source, not a new trainer."""
