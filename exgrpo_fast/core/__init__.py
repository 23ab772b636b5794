"""What every other folder may use: the values that travel, errors, processes, randomness."""
