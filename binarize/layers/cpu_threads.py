"""Runs a compiled loop on the OpenMP threads that torch itself uses.

A second pool of threads would compete with torch's: idle OpenMP workers spin for a while on the cores that it needs.
Where torch's runtime has no ``GOMP_parallel`` (GNU's, LLVM's and Intel's have it), and in a forked child, whose runtime
has lost its workers, the calling thread does everything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch

_PARENT = os.getpid()
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # not there, or a platform without a global symbol table
        return None
    function.argtypes = [_TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def run(loop: Callable[..., None], chunks: int, *args: Any) -> None:
    """Call ``loop(start, stop, *args)`` so that the ranges cover ``chunks``, on up to torch.get_num_threads() threads.

    Args:
        loop: A function compiled with ``nogil=True``.
        chunks: How many pieces of work there are.
        *args: Passed on.
    """
    parallel = _openmp()
    threads = min(torch.get_num_threads(), chunks)
    if threads <= 1 or parallel is None or os.getpid() != _PARENT:
        loop(0, chunks, *args)
        return
    edges = [chunks * k // threads for k in range(threads + 1)]
    turn = count()
    failures: list[BaseException] = []

    def task(_: int | None) -> None:
        # Each thread comes once, or one of them more often where the runtime gave fewer.
        for k in turn:
            if k >= threads:
                return
            try:
                loop(edges[k], edges[k + 1], *args)
            except BaseException as error:
                failures.append(error)

    parallel(_TASK(task), None, threads, 0)
    if failures:
        raise failures[0]
