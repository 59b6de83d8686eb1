"""Compiles the CPU kernels when they are first needed, and keeps the compiled code between runs."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from numba import types
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from binarize.kernels import bitpack
from binarize.kernels.cpu import (
    conv_worker,
    fields,
    norm_worker,
    parts,
    popcount,
    simd,
    tile,
    winograd_simd,
    winograd_worker,
)
from binarize.kernels.cpu.cache import cache_of
from binarize.kernels.cpu.parts import OPTIONS

_SOURCES = (bitpack, fields, parts, simd, popcount, tile, conv_worker, norm_worker, winograd_simd, winograd_worker)
_WORKERS = {
    "conv": conv_worker.conv_worker,
    "moments": norm_worker.moments_worker,
    "factors": norm_worker.factors_worker,
    "silu": norm_worker.silu_worker,
    "deal": norm_worker.deal_worker,
    "winograd": winograd_worker.winograd_worker,
    "winograd_filter": winograd_worker.filter_worker,
    "winograd_tiles": winograd_worker.tile_worker,
    "winograd_output": winograd_worker.output_worker,
    "winograd_filter_gradient": winograd_worker.filter_gradient_worker,
}
_SIGNATURE = normalize_signature(types.void(types.int64))
_log = logging.getLogger("binarize")
_lock = threading.Lock()
_alive: list[Any] = []  # compiled code lives as long as its function object


class _Worker(CFunc):
    """A compiled function, which says when it is compiled and not loaded from the cache."""

    def _compile_uncached(self) -> Any:
        _say_once()
        return super()._compile_uncached()  # type: ignore[misc]


@cache
def _say_once() -> None:
    _log.info("Compiling CPU kernels, which takes up to ten seconds; later runs on this machine load them.")


def worker(name: str) -> int:
    """Return the address of a compiled worker; a process compiles or loads only those that it calls."""
    with _lock:
        return _compiled(name)


@cache
def _digest() -> str:
    # Numba's cache looks only at a function's own file, and would keep code that an older version of another made.
    contents = b"".join(Path(str(module.__file__)).read_bytes() for module in _SOURCES)
    return hashlib.sha256(contents).hexdigest()[:16]


@cache
def _compiled(name: str) -> int:
    started, function = time.perf_counter(), _WORKERS[name]
    function.__qualname__ = f"{function.__name__}_{_digest()}"
    compiled: Any = _Worker(function, _SIGNATURE, {}, dict(OPTIONS))
    compiled._cache = cache_of(function)
    compiled.compile()
    _alive.append(compiled)
    _log.debug("CPU kernel %s ready after %.1f s.", name, time.perf_counter() - started)
    return int(compiled.address)
