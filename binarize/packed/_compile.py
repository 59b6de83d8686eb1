"""Compiles the CPU kernels when they are first needed, and keeps the compiled code between runs."""

from __future__ import annotations

import logging
import threading
import time
from functools import cache

_log = logging.getLogger("binarize")
_lock = threading.Lock()


def workers() -> dict[str, int]:
    """Return the addresses of the compiled workers by name."""
    with _lock:
        return _compiled()


@cache
def _compiled() -> dict[str, int]:
    from binarize.packed import _workers

    started = time.perf_counter()
    _log.info("Loading the CPU kernels; the first run on a machine compiles them, which takes some ten seconds.")
    made = _workers.compile_workers()
    _log.info("CPU kernels ready after %.1f s.", time.perf_counter() - started)
    return made
