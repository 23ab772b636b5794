"""Experience: what is kept (store), and which part of it is chosen (selectors)."""
