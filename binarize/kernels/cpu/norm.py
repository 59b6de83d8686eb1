"""GroupNorm's statistics, SiLU and shuffles of channels on a CPU: starts their workers."""

from __future__ import annotations

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from binarize.kernels.bitpack import LANES
from binarize.kernels.checks import as_channels_last
from binarize.kernels.cpu import threads
from binarize.kernels.cpu.compile import worker
from binarize.kernels.cpu.fields import Deal, Norm
from binarize.kernels.cpu.parameters import Fields, as_floats, empty_fields, empty_row_sums, set_image
from binarize.kernels.row_sums import RowSums


def norm_factors(
    x: Tensor, channel_bias: Tensor | None, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    row_sums: RowSums | None = None,
) -> Tensor:  # fmt: skip
    """Return GroupNorm's factors and offsets; see `binarize.kernels.ops.norm_factors`."""
    p = _rows(x.shape, x.dtype)[:]
    known = row_sums.tensor if row_sums is not None and row_sums.of is x else None
    sums = _row_sums(x, p) if known is None else known
    out = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32, device="cpu")
    epsilon, totals = array("d", [eps]), torch.empty(2 * x.shape[1] + LANES, dtype=torch.float64, device="cpu")
    rows = None if channel_bias is None else channel_bias.expand(x.shape[0], -1)
    alive = [None if t is None else as_floats(t) for t in (weight, bias, rows)]
    p[Norm.GROUPS], p[Norm.ROW_SUMS], p[Norm.EPS] = groups, sums.data_ptr(), epsilon.buffer_info()[0]
    p[Norm.WEIGHT], p[Norm.BIAS], p[Norm.SHIFT] = (0 if t is None else t.data_ptr() for t in alive)
    p[Norm.TOTALS] = totals.data_ptr()
    _set_norm(p, out)
    threads.run(worker("factors"), p.buffer_info()[0], 1)
    return out


def norm_silu(x: Tensor, input_norm: Tensor) -> Tensor:
    """Return ``silu(x * input_norm[0] + input_norm[1])``; see `binarize.kernels.ops.norm_silu`."""
    x = as_channels_last(x)
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    input_norm = as_floats(input_norm)
    p = _rows(x.shape, x.dtype)[:]
    set_image(p, Norm.X, x)
    set_image(p, Norm.OUT, out)
    _set_norm(p, input_norm)
    threads.run(worker("silu"), p.buffer_info()[0], p[Norm.COUNT])
    return out


def shuffle(hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return CS-Fusion's two mixtures, widths being multiples of 32; see `binarize.kernels.ops.shuffle`."""
    (batch, channels, height, width), more = hidden.shape, skip.shape[1]
    size, kind = (batch, (channels + more) // 2, height, width), hidden.dtype
    first, second = (torch.empty(size, dtype=kind, device="cpu", memory_format=torch.channels_last) for _ in range(2))
    apart = second.data_ptr() - first.data_ptr()
    _deal(hidden, second[:, : channels // 2], 2, 1, (-apart, 0))
    _deal(skip, first[:, channels // 2 :], 2, 1, (apart, 0))
    return first, second


def pixel_shuffle(x: Tensor, image: Tensor, back: bool = False) -> None:
    """Write ``F.pixel_shuffle(x, 2)`` to ``image``. With ``back``, write ``F.pixel_unshuffle(image, 2)`` to ``x``.

    Both have one dtype and the channels of a pixel side by side. The image's number of channels is a multiple of 16.
    """
    row, column = (stride * image.element_size() for stride in image.stride()[2:])
    _deal(x, image, 4, 2, (column, row), back)


def _deal(x: Tensor, place: Tensor, ways: int, step: int, apart: tuple[int, int], back: bool = False) -> None:
    """Distribute the channels of ``x`` over ``ways`` places: see `Deal` for ``place``, ``apart`` and ``back``.

    Neighbouring pixels of ``x`` are ``step`` pixels apart there.
    """
    x, p = as_channels_last(x), empty_fields(Deal)
    batch, p[Deal.CHANNELS], p[Deal.HEIGHT], p[Deal.WIDTH] = x.shape
    p[Deal.COUNT], p[Deal.BF16], p[Deal.WAYS] = batch * x.shape[2], int(x.dtype == torch.bfloat16), ways
    p[Deal.COLUMN], p[Deal.ROW], p[Deal.BACK] = *apart, int(back)
    set_image(p, Deal.X, x)
    set_image(p, Deal.PLACE, place)
    p[Deal.PLACE_ROW], p[Deal.PLACE_PIXEL] = step * p[Deal.PLACE_ROW], step * p[Deal.PLACE_PIXEL]
    threads.run(worker("deal"), p.buffer_info()[0], p[Deal.COUNT])


def _row_sums(x: Tensor, p: array[int]) -> Tensor:
    """Return the row sums of ``x``, computed with the parameters ``p`` of a pass over it."""
    x = as_channels_last(x)
    sums = empty_row_sums(x)
    if x.numel() == 0:
        return sums.zero_()
    p[Norm.ROW_SUMS] = sums.data_ptr()
    set_image(p, Norm.X, x)
    threads.run(worker("moments"), p.buffer_info()[0], p[Norm.COUNT])
    return sums


def _set_norm(p: Fields, norm: Tensor) -> None:
    """Set the addresses of factors and offsets, dense ``(2, B, C)`` float32."""
    p[Norm.FACTORS] = norm.data_ptr()
    p[Norm.OFFSETS] = p[Norm.FACTORS] + 4 * norm.shape[1] * norm.shape[2]


@lru_cache(maxsize=512)
def _rows(size: tuple[int, int, int, int], dtype: torch.dtype) -> array[int]:
    """Return the parameters of a pass over all rows, without addresses."""
    batch, channels, height, width = size
    p = empty_fields(Norm)
    p[Norm.COUNT], p[Norm.BF16] = batch * height, int(dtype == torch.bfloat16)
    p[Norm.HEIGHT], p[Norm.WIDTH], p[Norm.CHANNELS] = height, width, channels
    return p
