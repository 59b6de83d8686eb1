"""Runs compiled code on several threads of the OpenMP runtime that torch itself uses.

A second runtime in the process would cost milliseconds per call, because its idle workers spin on the cores that
torch's need; so no threading layer of numba's is used. GNU's, LLVM's and Intel's runtimes have `GOMP_parallel`.
Without it, plain Python threads run the tasks. A forked child has lost the runtime's workers and uses one thread, as
does torch there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count as counter
from typing import Any

import torch

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True
    _executor.cache_clear()
    torch.set_num_threads(1)


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


def count() -> int:
    """Return how many threads a call may use: torch's setting, or one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


@cache
def has_amx() -> bool:
    """Return whether the processor multiplies bfloat16 matrices in tiles (AMX), where torch's convolutions win."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def run(worker: int, parameters: int, tasks: int, threads: int | None = None) -> None:
    """Call a compiled worker ``void(parameters)`` on several threads and wait for all of them.

    ``worker`` and ``parameters`` are addresses. The worker takes tasks until none is left. ``threads`` is an upper
    limit; None stands for `count`.
    """
    if tasks == 0:
        return
    threads = min(threads or count(), tasks)
    parallel = openmp() if threads > 1 else None
    if parallel is not None:
        parallel(worker, parameters, threads, 0)
        return
    function = _function(worker)
    futures = [_executor(threads).submit(function, parameters) for _ in range(threads - 1)]
    function(parameters)
    for future in futures:
        future.result()


def run_loop(loop: Callable[..., None], chunks: int, *args: Any) -> None:
    """Call ``loop(start, stop, *args)``, compiled with ``nogil=True``, so that the ranges cover ``chunks``."""
    parallel, threads = openmp(), min(count(), chunks)
    if threads <= 1 or parallel is None:
        loop(0, chunks, *args)
        return
    edges = [chunks * k // threads for k in range(threads + 1)]
    turn = counter()
    failures: list[BaseException] = []

    def task(_: int | None) -> None:
        # Every thread is called once, or one of them more often where the runtime has fewer.
        for k in turn:
            if k >= threads:
                return
            try:
                loop(edges[k], edges[k + 1], *args)
            except BaseException as error:
                failures.append(error)

    called = _TASK(task)
    parallel(ctypes.cast(called, ctypes.c_void_p).value, 0, threads, 0)
    if failures:
        raise failures[0]
