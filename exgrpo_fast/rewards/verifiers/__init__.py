"""The built-in rewards, each a function of a completion and a gold answer."""
