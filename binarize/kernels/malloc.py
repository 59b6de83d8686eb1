"""Settings of the C library's heap. Only glibc has them, and what a user has set takes precedence."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# Of malloc.h, with the names of the environment and of GLIBC_TUNABLES.
_OPTIONS = {"trim_threshold": -1, "mmap_threshold": -3}
LARGE, LARGEST, KEPT = 4 * 2**20, 32 * 2**20, 256 * 2**20


@cache
def keep_large_blocks_apart() -> bool:
    """Allocate blocks of 4 MiB and more with mmap, for the rest of the process.

    By default glibc raises this threshold up to 32 MiB when such blocks are freed. Activations then come from its heap,
    between gradients and optimiser states that stay, and the heap grows by about the size of the activations. The
    result is whether the threshold was set.
    """
    return _set(mmap_threshold=LARGE)


@cache
def keep_freed_memory() -> bool:
    """Keep up to 256 MiB of freed memory for the next allocations, for the rest of the process.

    By default glibc returns the end of its heap to the system once 64 MiB are free. The activations of a step are then
    new pages in the next one, which the system fills with zeros, and a step of a packed network takes a tenth longer.
    The result is whether the thresholds were set; `keep_large_blocks_apart` takes precedence as well.
    """
    if keep_large_blocks_apart.cache_info().currsize:
        return False
    return _set(mmap_threshold=LARGEST, trim_threshold=KEPT)


def _set(**thresholds: int) -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    user_set = any(f"MALLOC_{name.upper()}_" in os.environ or name in tunables for name in _OPTIONS)
    if user_set or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    return all(mallopt(_OPTIONS[name], value) for name, value in thresholds.items())
