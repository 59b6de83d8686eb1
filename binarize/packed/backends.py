"""Which code runs the packed operators: compiled kernels on a CPU, plain torch everywhere else.

The choice is made at each call. ``BINARIZE_BACKEND=torch`` in the environment, or `use` in code, asks for plain torch.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from binarize.errors import BinarizeError, did_you_mean

Backend = Literal["auto", "numba", "torch"]
BACKENDS = ("auto", "numba", "torch")
VARIABLE = "BINARIZE_BACKEND"

_log = logging.getLogger("binarize")
_chosen: ContextVar[str | None] = ContextVar("binarize_backend", default=None)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Within the block, run packed operators on one backend.

    Args:
        backend: "numba", "torch", or "auto": numba where it can, else torch.

    Raises:
        BinarizeError: If there is no such backend, or numba is asked for and cannot be used.
    """
    _check(backend, "use")
    if backend == "numba":
        _kernels()
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def current() -> str:
    """Return the backend that is asked for: by `use`, else by the environment, else "auto"."""
    chosen = _chosen.get() or os.environ.get(VARIABLE) or "auto"
    _check(chosen, VARIABLE)
    return chosen


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the compiled kernels if they can take a tensor like ``x``, or None for plain torch."""
    asked = current()
    if asked == "torch" or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _kernels() if asked == "numba" else _kernels_if_any()


def _check(backend: str, where: str) -> None:
    if backend not in BACKENDS:
        raise BinarizeError(
            f"{where}: unknown backend {backend!r}; backends: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )


@cache
def _kernels_if_any() -> ModuleType | None:
    try:
        return _kernels()
    except BinarizeError as error:
        _log.warning("%s Plain torch is used instead, which is exact and slow.", error)
        return None


@cache
def _kernels() -> ModuleType:
    try:
        return importlib.import_module("binarize.packed._cpu")
    except ImportError as error:
        raise BinarizeError(f"the CPU kernels need numba, which cannot be imported: {error}.") from error
