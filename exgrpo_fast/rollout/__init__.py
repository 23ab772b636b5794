"""Engines that turn prompts into completions, behind one protocol."""
