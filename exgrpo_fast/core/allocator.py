"""Settings of glibc's allocator that keep what is freed. Loads no torch.

By default glibc returns large blocks to the system as soon as they are freed, and every page of the next
one is a page fault that the kernel answers with zeros. A loop that makes logits of a large batch at each
token pays that again and again; `bench/cpu_memory.py` counts it.
"""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3): parameters of malloc.h, and the values that keep the most.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = {
    _M_MMAP_THRESHOLD: 32 * 2**20,  # the largest that glibc accepts on 64 bits
    _M_TRIM_THRESHOLD: 2**31 - 1,  # an int; free memory at the end of the heap stays below it
}


def keep_freed_memory() -> bool:
    """Whether it is so now: in this process, from here on.

    Not where the C library is another one, and not where the environment has its own settings.
    Memory that is kept is used again by whatever this process allocates next; its peak is the same.
    """
    if not can_keep():
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())


def can_keep() -> bool:
    is_glibc = platform.libc_ver()[0] == "glibc"
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    return is_glibc and not chosen and "malloc" not in os.environ.get("LD_PRELOAD", "")
