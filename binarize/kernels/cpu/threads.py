"""Runs a compiled worker on several threads, on the OpenMP runtime that torch itself uses.

A second runtime in the process would cost milliseconds a call: each one's idle workers spin on the cores that the
other one needs. So no threading layer of numba's is used. Where torch's runtime has no `GOMP_parallel` (GNU's, LLVM's
and Intel's have it), plain threads take the tasks.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the runtime's workers stayed in the parent, and a call would wait for them for ever
    _executor.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def openmp() -> ctypes._NamedFuncPointer | None:
    """Return ``GOMP_parallel`` of the runtime that torch has loaded, or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not there, or a platform without a global symbol table
        return None
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="binarize")


@cache
def _function(worker: int) -> Any:
    return _WORKER(worker)


def run(worker: int, parameters: int, tasks: int, threads: int | None = None) -> None:
    """Call a compiled ``void worker(parameters)`` on several threads, and wait for all.

    Args:
        worker: Address of the function; it takes tasks until none is left.
        parameters: Address of its parameters.
        tasks: How many tasks there are.
        threads: On how many threads at most; as many as `workers` if None.
    """
    if tasks == 0:
        return
    threads = min(threads or workers(), tasks)
    if threads <= 1:
        _function(worker)(parameters)
        return
    parallel = openmp()
    if parallel is not None:
        parallel(worker, parameters, threads, 0)
        return
    function = _function(worker)
    futures = [_executor(threads).submit(function, parameters) for _ in range(threads - 1)]
    function(parameters)
    for future in futures:
        future.result()


@cache
def has_tiles() -> bool:
    """Say whether the processor multiplies bfloat16 matrices in tiles (AMX), where torch's convolutions are fastest."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def workers() -> int:
    """Return how many threads a call may use: torch's setting, and one in a forked child."""
    return 1 if _forked else torch.get_num_threads()
