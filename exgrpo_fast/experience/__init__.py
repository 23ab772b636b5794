"""Where the trajectories of a group come from."""
