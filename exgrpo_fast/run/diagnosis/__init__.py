"""What is wrong with a run, read from its metrics: ours, TRL's, verl's."""
