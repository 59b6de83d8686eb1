"""Which code runs the packed operators: numba's kernels on a CPU, Triton's on CUDA, plain torch everywhere else.

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

Backend = Literal["auto", "numba", "triton", "torch"]
BACKENDS = ("auto", "numba", "triton", "torch")
VARIABLE = "BINARIZE_BACKEND"
_MODULES = {"numba": ("binarize.kernels.cpu.conv", "CPU"), "triton": ("binarize.kernels.cuda", "CUDA")}
_DTYPES = {"numba": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}

_log = logging.getLogger("binarize")
_chosen: ContextVar[str | None] = ContextVar("binarize_backend", default=None)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Within the block, run packed operators on one backend.

    Args:
        backend: "numba" (CPUs), "triton" (CUDA), or "auto", the one that the tensors' device has; plain torch takes
            what the backend does not. "torch" is plain torch for everything.

    Raises:
        BinarizeError: If there is no such backend, or one is asked for by name and cannot be used.
    """
    _check(backend, "use")
    if backend in _MODULES:
        _kernels(backend)
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
    return _kernels_of(asked, asked == "triton" and _interprets(), x.device, x.dtype)


@cache
def _kernels_of(asked: str, interprets: bool, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    if asked == "torch":
        return None
    name = "triton" if device.type == "cuda" or (asked == "triton" and interprets) else "numba"
    if asked not in ("auto", name) or dtype not in _DTYPES[name] or device.type not in ("cpu", "cuda"):
        return None
    if asked == name:
        return _kernels(name)
    return _kernels_if_any(name, device.index if name == "triton" else None)


def cpu_kernels(x: Tensor | None = None) -> ModuleType | None:
    """Return numba's kernels if packed operators run them on CPUs (and on a tensor like ``x``), or None."""
    if current() == "triton" or (x is not None and x.device.type != "cpu"):
        return None
    return kernels_for(torch.empty(0, dtype=torch.float32, device="cpu") if x is None else x)


def _interprets() -> bool:
    """Say whether Triton runs its kernels on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check(backend: str, where: str) -> None:
    if backend not in BACKENDS:
        raise BinarizeError(
            f"{where}: unknown backend {backend!r}; backends: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )


@cache
def _kernels_if_any(name: str, gpu: int | None) -> ModuleType | None:
    try:
        kernels = _kernels(name)
        if gpu is not None:
            kernels.check(gpu)
        return kernels
    except BinarizeError as error:
        _log.warning("%s Plain torch is used instead, which is exact and slow.", error)
        return None


@cache
def _kernels(name: str) -> ModuleType:
    module, device = _MODULES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BinarizeError(f"the {device} kernels need {name}, which cannot be imported: {error}.") from error
