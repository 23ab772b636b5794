"""Experience: how much is kept (plan), where (pages, store), which part is chosen (selectors), and
how it is saved and looked at (snapshot)."""
