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
    between gradients and optimiser states that stay, and the heap grows by about the size of the activations. This
    undoes `keep_freed_memory`. The result is whether the threshold was set.
    """
    undone = {"trim_threshold": 2 * LARGE} if keep_freed_memory.cache_info().currsize else {}
    return _set(mmap_threshold=LARGE, **undone)


@cache
def keep_freed_memory() -> bool:
    """Keep up to 256 MiB of freed memory for the next allocations, for the rest of the process.

    By default glibc returns the end of its heap to the system once 64 MiB of it or less are free. The activations of a
    step are then new pages in the next one. Filling them with zeros takes about a tenth of a packed step in float32 at
    256x256. This does nothing after `keep_large_blocks_apart`. The result is whether the thresholds were set.
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
