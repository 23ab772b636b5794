"""Experience replay inside other trainers; one module each, imported only when asked for."""
