"""Attention over a pack whose completions share their prompts.

A prompt token sees the prompt up to itself; a completion token sees its whole prompt and its own
completion up to itself. Where a layer has a sliding window, no token sees one that lies `window` or
more positions before it.

    layout.py       where prompts and completions lie in a pack
    backends.py     which back ends there are, and which can run here
    interface.py    the way in: what transformers' layers call
    sdpa.py  flex.py  varlen.py    the back ends; flash and varlen share one file
    blocks.py       one block of sequences after the other, at the memory of one
"""
