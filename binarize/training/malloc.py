"""Keeps large blocks of memory out of the C library's heap, where they would leave holes that nothing else fits."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 4 * 2**20


@cache
def keep_large_blocks_apart() -> bool:
    """Have blocks of 4 MiB and more come from the system and go back to it, for the rest of the process.

    glibc raises this limit by itself up to 32 MiB as such blocks are freed. Activations then come from its heap,
    between gradients and an optimiser's state that stay, and the heap grows by about as much as these take.

    Returns:
        Whether that was done: glibc alone has the setting, and who set it in the environment is left alone.
    """
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
