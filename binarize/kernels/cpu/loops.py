"""Runs a compiled loop on the OpenMP threads that torch itself uses.

A second pool of threads would compete with torch's: idle OpenMP workers spin for a while on the cores that it needs.
Where torch's runtime has no ``GOMP_parallel`` (GNU's, LLVM's and Intel's have it), and in a forked child, whose runtime
has lost its workers, the calling thread does everything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import count
from typing import Any

from binarize.kernels.cpu import threads as _threads

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: Callable[..., None], chunks: int, *args: Any) -> None:
    """Call ``loop(start, stop, *args)`` so that the ranges cover ``chunks``, on up to torch.get_num_threads() threads.

    Args:
        loop: A function compiled with ``nogil=True``.
        chunks: How many pieces of work there are.
        *args: Passed on.
    """
    parallel = _threads.openmp()
    threads = min(_threads.workers(), chunks)
    if threads <= 1 or parallel is None:
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

    called = _TASK(task)
    parallel(ctypes.cast(called, ctypes.c_void_p).value, 0, threads, 0)
    if failures:
        raise failures[0]
