"""The choice of the code that runs the operators: numba's kernels on a CPU, Triton's on CUDA, plain torch elsewhere.

The backend is chosen at each call: by `use` if it is active, else by the environment variable ``BINARIZE_BACKEND``.
The variable is read once per process; forked processes inherit it. "torch" selects plain torch.

A backend is a module with `run`, `norm_factors` and `norm_silu`, as in `binarize.kernels.reference`. It need not fill
the row sums that a convolution is given.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
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
# Numba and LLVM end the process, or print a traceback, for other values. The patterns are of the whole value.
_NUMBA_VARIABLES = {
    "NUMBA_NUM_THREADS": (r"0*[1-9]\d{0,5}", "a number of at least 1 (OMP_NUM_THREADS sets the kernels' threads)"),
    "NUMBA_CPU_FEATURES": (r"([+-][\w.-]+(,[+-][\w.-]+)*)?", "a list such as +avx2,-avx512f"),
    "NUMBA_DISABLE_JIT": (r"0+", "0, since kernels that are not compiled do not run"),
}
_MODULES = {"numba": ("binarize.kernels.cpu.backend", "CPU"), "triton": ("binarize.kernels.cuda", "CUDA")}
_DTYPES = {"numba": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}

_log = logging.getLogger("binarize")
_chosen: ContextVar[str | None] = ContextVar("binarize_backend", default=None)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run packed operators on one backend within the ``with`` block.

    "numba" runs on CPUs, "triton" on CUDA, and "auto" selects by the tensors' device; plain torch runs what a backend
    does not support. "torch" runs everything in plain torch.
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
    """Return the selected backend: by `use`, else by the environment, else "auto"."""
    return _chosen.get() or _by_environment()


@cache
def _by_environment() -> str:
    chosen = os.environ.get(VARIABLE) or "auto"
    _check(chosen, VARIABLE)
    return chosen


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the backend's module if it supports tensors like ``x``, or None for plain torch."""
    selected = current()
    interprets = selected == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, as in tests
    return _kernels_of(selected, interprets, x.device, x.dtype)


@cache
def _kernels_of(selected: str, interprets: bool, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    if selected == "torch":
        return None
    name = "triton" if device.type == "cuda" or (selected == "triton" and interprets) else "numba"
    if selected not in ("auto", name) or dtype not in _DTYPES[name] or device.type not in ("cpu", "cuda"):
        return None
    if selected == name:
        return _kernels(name)
    return _kernels_if_any(name, device.index if name == "triton" else None)


def cpu_kernels(x: Tensor | None = None) -> ModuleType | None:
    """Return the CPU backend's module if it runs (and supports tensors like ``x``), or None."""
    if current() == "triton" or (x is not None and x.device.type != "cpu"):
        return None
    return kernels_for(torch.empty(0, dtype=torch.float32, device="cpu") if x is None else x)


def _check(backend: str, where: str) -> None:
    if backend not in BACKENDS:
        raise BinarizeError(
            f"{where}: unknown backend {backend!r}; backends: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )


def _check_numba_environment() -> None:
    for name, (pattern, allowed) in _NUMBA_VARIABLES.items():
        given = os.environ.get(name)
        if given is not None and not re.fullmatch(pattern, given.strip()):
            raise BinarizeError(
                f"{name}={given!r:.40}: numba, which compiles the CPU kernels, needs {allowed}; unset it."
            )


@cache
def _kernels_if_any(name: str, gpu: int | None) -> ModuleType | None:
    if name == "numba":
        _check_numba_environment()
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
