"""What the element-wise loops share: tensors as arrays, bfloat16 numbers, and compiling.

Tensors are viewed as ``(pixels, C)`` arrays of channels_last memory, bfloat16 ones as their bits in uint16, which are
computed in float32. Sums over pixels are float32 over `CHUNK` pixels, and float64 over these sums.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from binarize.kernels.cpu.cache import cache_of

CHUNK = 128
_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def get(array: Any, i: int, c: int) -> Any:
    """Read a number as float32; uint16 are the bits of bfloat16, uint8 is what `encode` wrote."""
    raise NotImplementedError  # pragma: no cover - replaced in compiled code


@overload(get)
def _compiled_get(array: Any, i: Any, c: Any) -> Any:
    if array.dtype == types.uint16:

        def get_bf16(array: Any, i: Any, c: Any) -> Any:
            return as_float(np.uint32(np.uint32(array[i, c]) << np.uint32(16)))

        return get_bf16
    if array.dtype == types.uint8:

        def get_code(array: Any, i: Any, c: Any) -> Any:
            return (np.float32(array[i, c]) - np.float32(127.5)) * np.float32(1 / 127)

        return get_code

    def get_plain(array: Any, i: Any, c: Any) -> Any:
        return np.float32(array[i, c])

    return get_plain


def put(array: Any, i: int, c: int, value: float) -> None:
    """Write a float32, rounded to nearest even where the array is bfloat16; NaNs of arithmetic, 0x7FC00000, stay so."""
    raise NotImplementedError  # pragma: no cover - replaced in compiled code


@overload(put)
def _compiled_set(array: Any, i: Any, c: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def put_bf16(array: Any, i: Any, c: Any, value: Any) -> None:
            bits = as_bits(np.float32(value))
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
            array[i, c] = np.uint16(rounded >> np.uint32(16))

        return put_bf16

    def put_plain(array: Any, i: Any, c: Any, value: Any) -> None:
        array[i, c] = value

    return put_plain


def compiled(function: Any) -> Any:
    """Compile a loop ``f(start, stop, ...)``; its cached code is dropped when this file changes."""
    function.__qualname__ = f"{function.__name__}_{_DIGEST}"
    loop = njit(nogil=True, boundscheck=False, error_model="numpy")(function)
    loop._cache = cache_of(function)
    return loop


def as_array(x: Tensor) -> Any:
    """See ``(B, C, H, W)`` in channels_last memory as ``(B H W, C)``."""
    flat = x.detach().permute(0, 2, 3, 1).view(-1, x.shape[1])
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def as_rows(rows: Tensor) -> Any:
    return rows.detach().to(torch.float32).contiguous().numpy()


def row_sizes(x: Tensor, rows: int) -> tuple[int, int]:
    """Return the chunks of all pixels, and the pixels that share one of the rows."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return -(-pixels // CHUNK), max(pixels // rows, 1)


def count_chunks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[2] * x.shape[3] // CHUNK)


def add_chunks(sums: Any, x: Tensor, rows: int) -> Tensor:
    """Add what each chunk summed, ``(..., chunks, C)``, to rows ``(..., R, C)``."""
    total = torch.from_numpy(sums)
    total = total.view(*total.shape[:-2], rows, -1, total.shape[-1])
    return total.sum(-2, dtype=torch.float64).to(torch.float32)
