"""Keep large blocks out of the C library's heap, where they would fragment it."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 4 * 2**20


@cache
def keep_large_blocks_apart() -> bool:
    """Allocate blocks of 4 MiB and more with mmap, for the rest of the process.

    By default glibc raises this threshold up to 32 MiB when such blocks are freed. Activations then come from its heap,
    between gradients and optimiser states that stay, and the heap grows by about the size of the activations. The
    result is whether the threshold was set: only glibc has it, and a value in the environment takes precedence.
    """
    user_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if user_set or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE))
