"""Blocks of int64 fields: the only argument of a compiled worker, with addresses, strides in bytes and sizes."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from binarize.kernels.row_sums import RowSums

Fields = MutableSequence[int] | np.ndarray
ALIGN = 64
# The image rows or words of a task; what a worker reads again should stay in the second-level cache.
STRIP_BYTES = 100_000
TASKS_PER_THREAD = 4


def aligned(size: int) -> int:
    """Return the size rounded up to whole cache lines."""
    return -(-size // ALIGN) * ALIGN


def empty_fields(fields: type[IntEnum]) -> array[int]:
    """Return a block of zeros for these fields."""
    return array("q", bytes(8 * len(fields)))


def set_image(p: Fields, field: int, x: Tensor) -> None:
    """Set ``field`` and the next three: the address of ``x`` and its strides per sample, row and pixel."""
    size, strides = x.element_size(), x.stride()
    p[field], p[field + 1], p[field + 2], p[field + 3] = (
        x.data_ptr(), strides[0] * size, strides[2] * size, strides[3] * size,
    )  # fmt: skip


def set_scratch(p: Fields, field: int, workers: int, size: int) -> Tensor:
    """Set ``field`` and the next to ``size`` bytes of scratch memory per worker; it lives as long as the result."""
    memory = torch.empty(workers * size + ALIGN, dtype=torch.uint8, device="cpu")
    p[field], p[field + 1] = aligned(memory.data_ptr()), size
    return memory


def empty_row_sums(out: Tensor) -> Tensor:
    """Return a tensor for the row sums of ``out``; see `RowSums`."""
    batch, channels, height, _ = out.shape
    return torch.empty(batch, height, 2, channels, dtype=torch.float32, device="cpu")


def set_row_sums(p: Fields, field: int, row_sums: RowSums | None, out: Tensor) -> None:
    """Have the worker write the row sums of its output into ``row_sums``, if given."""
    if row_sums is not None:
        row_sums.of, row_sums.tensor = out, empty_row_sums(out)
        p[field] = row_sums.tensor.data_ptr()


def as_floats(values: Tensor) -> Tensor:
    """Return parameters as kernels read them: dense float32."""
    return values.float().contiguous()
