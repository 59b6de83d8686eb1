"""Compiles the CPU kernels when they are first needed, and keeps the compiled code between runs."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_log = logging.getLogger("binarize")
_lock = threading.Lock()
_kept: list[Any] = []  # compiled code lives as long as its function object


def workers() -> dict[str, int]:
    """Return the addresses of the compiled workers by name."""
    with _lock:
        return _compiled()


@cache
def _compiled() -> dict[str, int]:
    from binarize.kernels import bitpack as _layout
    from binarize.kernels.cpu import conv_worker as _workers
    from binarize.kernels.cpu import popcount as _tile
    from binarize.kernels.cpu import simd as _vectors
    from binarize.kernels.cpu import winograd_simd as _winograd_vectors
    from binarize.kernels.cpu import winograd_worker as _winograd_workers

    started = time.perf_counter()
    _log.info("Loading the CPU kernels; the first run on a machine compiles them, which takes some twenty seconds.")
    # Numba's cache looks at a function's own file alone, and would go on with what an earlier version of another said.
    modules = (_layout, _vectors, _tile, _workers, _winograd_vectors, _winograd_workers)
    sources = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()
    made = {}
    for name, function in {**_workers.WORKERS, **_winograd_workers.WORKERS}.items():
        function.__qualname__ = f"{function.__name__}_{sources[:16]}"
        worker = _compile(function)
        _kept.append(worker)
        made[name] = worker.address
    _log.info("CPU kernels ready after %.1f s.", time.perf_counter() - started)
    return made


def _compile(function: Any) -> Any:
    from numba import cfunc, types

    return cached(lambda cache: cfunc(types.void(types.int64), nopython=True, cache=cache)(function))


def cached(compiled: Callable[[bool], Any]) -> Any:
    """Return ``compiled(cache)``: code that numba keeps between runs, where it has a folder for it."""
    try:
        return compiled(True)
    except RuntimeError as error:  # neither the package's folder nor the user's own can be written
        if "cache" not in str(error):
            raise
        return compiled(False)
