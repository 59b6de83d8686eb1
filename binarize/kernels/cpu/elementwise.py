"""The element-wise steps of a training step in one pass each, compiled by numba; see `binarize.kernels.training`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from binarize.kernels.binary_conv import BinaryConv, Geometry, OutputTransform, padding_correction
from binarize.kernels.bitpack import FilterShape, from_bits
from binarize.kernels.cpu import arrays, conv
from binarize.kernels.cpu.arrays import CHUNK, as_array, as_rows, compiled, count_chunks, get, put, row_sizes
from binarize.kernels.cpu.threads import run_loop
from binarize.kernels.signs import SignZero

_SURROGATES = {"identity": 0, "clip": 1, "approx": 2}


@compiled
def _signs(start, stop, per_row, x, shift, zero_sign, out):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    signed = np.empty(channels, np.float32)
    above, zero, below = np.float32(1), np.float32(0), np.float32(-1)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row = shift[i // per_row]
        for c in range(channels):
            v = get(x, i, c) + row[c]
            low = below if v < zero else v + zero_sign  # 0, or a NaN that stays one
            signed[c] = above if v > zero else low
        for c in range(channels):
            put(out, i, c, signed[c])


@compiled
def _encode(start, stop, per_row, x, shift, out):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    v = np.empty(channels, np.float32)
    one, steps, last = np.float32(1), np.float32(127), np.float32(126)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row = shift[i // per_row]
        for c in range(channels):
            v[c] = get(x, i, c) + row[c]
        for c in range(channels):
            size = abs(v[c])
            inside = np.int32(min(size * steps, last))
            step = inside if size <= one else np.int32(127)
            out[i, c] = np.uint8(np.int32(128) + step if v[c] >= 0 else np.int32(127) - step)


@compiled
def _activate(start, stop, per_row, dot, scale, rows, shortcut, add, out):  # type: ignore[no-untyped-def]
    channels = dot.shape[1]
    active = np.empty(channels, np.float32)
    zero = np.float32(0)
    for i in range(start * CHUNK, min(stop * CHUNK, dot.shape[0])):
        shift_in, slope, shift_out = rows[0, i // per_row], rows[1, i // per_row], rows[2, i // per_row]
        for c in range(channels):
            u, s = get(dot, i, c) * scale[c] + shift_in[c], slope[c]
            active[c] = (u if u > zero else u * s) + shift_out[c]
        if add:
            for c in range(channels):
                put(out, i, c, active[c] + get(shortcut, i, c))
        else:
            for c in range(channels):
                put(out, i, c, active[c])


@compiled
def _activate_backward(start, stop, per_sample, per_row, grad, dot, scale, rows, out, sums):  # type: ignore[no-untyped-def]
    channels = dot.shape[1]
    chunks = (per_sample + CHUNK - 1) // CHUNK
    for chunk in range(start, stop):
        sample, part = chunk // chunks, chunk % chunks
        first = sample * per_sample + part * CHUNK
        last = min(first + CHUNK, (sample + 1) * per_sample)
        shift_in, slope = rows[0, first // per_row], rows[1, first // per_row]
        of_in, of_slope, of_out = sums[0, chunk], sums[1, chunk], sums[2, chunk]
        for i in range(first, last):
            for c in range(channels):
                u, s, g = get(dot, i, c) * scale[c] + shift_in[c], slope[c], get(grad, i, c)
                inner = g if u > 0 else g * s
                of_in[c] += inner
                of_slope[c] += np.float32(0) if u > 0 else g * u
                of_out[c] += g
                put(out, i, c, inner)


@compiled
def _sign_backward(start, stop, per_sample, per_row, grad, x, shift, through, add, kind, out, sums):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    chunks = (per_sample + CHUNK - 1) // CHUNK
    # Loops over few arrays each, so that the compiler can tell that they do not overlap.
    two, zero, one = np.float32(2), np.float32(0), np.float32(1)
    inner = np.empty(channels, np.float32)
    for chunk in range(start, stop):
        sample, part = chunk // chunks, chunk % chunks
        first = sample * per_sample + part * CHUNK
        last = min(first + CHUNK, (sample + 1) * per_sample)
        row, of_shift = shift[first // per_row], sums[chunk]
        for i in range(first, last):
            if kind == 2:
                for c in range(channels):
                    slope = two - two * abs(get(x, i, c) + row[c])
                    inner[c] = get(grad, i, c) * (slope if slope > zero else zero)
            elif kind == 1:
                for c in range(channels):
                    inner[c] = get(grad, i, c) * (one if abs(get(x, i, c) + row[c]) <= one else zero)
            else:
                for c in range(channels):
                    inner[c] = get(grad, i, c)
            for c in range(channels):
                of_shift[c] += inner[c]
            if add:
                for c in range(channels):
                    put(out, i, c, inner[c] + get(through, i, c))
            else:
                for c in range(channels):
                    put(out, i, c, inner[c])


@compiled
def _pack(start, stop, weight, taps, out, counts):  # type: ignore[no-untyped-def]
    # weight (C_out, C_in * taps); out (blocks, taps * words, 16) as `binarize.kernels.bitpack` lays filters out; counts
    # (taps, blocks * 16)
    channels = weight.shape[1] // taps
    words = (channels + 31) // 32
    for o in range(start, stop):
        block, lane = o // 16, o % 16
        for word in range(words):
            width = min(32, channels - 32 * word)
            for tap in range(taps):
                bits, ones = np.uint32(0), 0
                for c in range(width):
                    one = weight[o, (32 * word + c) * taps + tap] >= 0
                    ones += one
                    bits |= np.uint32(np.uint32(one) << np.uint32(c))
                out[block, tap * words + word, lane] = bits
                counts[tap, o] += 2 * ones - width


@compiled
def _scaled_codes(start, stop, weight, scale, out):  # type: ignore[no-untyped-def]
    for o in range(start, stop):
        above = scale[o]
        below = -above
        for i in range(weight.shape[1]):
            out[o, i] = above if weight[o, i] >= 0 else below


@compiled
def _clip(start, stop, weight, grad):  # type: ignore[no-untyped-def]
    zero = np.float32(0)
    for o in range(start, stop):
        for i in range(weight.shape[1]):
            grad[o, i] = grad[o, i] if abs(weight[o, i]) <= 1 else zero


def signs(x: Tensor, shift: Tensor | None, zero: SignZero, dtype: torch.dtype) -> Tensor:
    """See `binarize.kernels.training.signs`."""
    shift = x.new_zeros(1, x.shape[1]) if shift is None else shift
    out = torch.empty_like(x, dtype=dtype)
    zero_sign = np.float32(1 if zero == "plus" else 0)
    run_loop(_signs, *row_sizes(x, len(shift)), as_array(x), as_rows(shift), zero_sign, as_array(out))
    return out


def encode(x: Tensor, shift: Tensor | None) -> Tensor:
    """See `binarize.kernels.training.encode`."""
    shift = x.new_zeros(1, x.shape[1]) if shift is None else shift
    out = torch.empty_like(x, dtype=torch.uint8)
    run_loop(_encode, *row_sizes(x, len(shift)), as_array(x), as_rows(shift), as_array(out))
    return out


def _scale(scale: Tensor | None, channels: int) -> Any:
    return np.ones(channels, np.float32) if scale is None else as_rows(scale)


def activate(dot: Tensor, scale: Tensor | None, rprelu: Any, shortcut: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `binarize.kernels.training.activate`."""
    out = torch.empty_like(dot, dtype=dtype)
    rows, factors = as_rows(torch.stack(list(rprelu))), _scale(scale, dot.shape[1])
    added = as_array(out if shortcut is None else shortcut)
    inputs = as_array(dot), factors, rows, added, shortcut is not None
    run_loop(_activate, *row_sizes(dot, rows.shape[1]), *inputs, as_array(out))
    return out


def activate_backward(
    grad: Tensor, dot: Tensor, scale: Tensor | None, rprelu: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `binarize.kernels.training.activate_backward`."""
    out = torch.empty_like(grad, dtype=dtype)
    rows, factors = as_rows(torch.stack(list(rprelu))), _scale(scale, dot.shape[1])
    sums = np.zeros((3, count_chunks(dot), dot.shape[1]), np.float32)
    sizes = count_chunks(dot), dot.shape[2] * dot.shape[3], row_sizes(dot, rows.shape[1])[1]
    run_loop(_activate_backward, *sizes, as_array(grad), as_array(dot), factors, rows, as_array(out), sums)
    of_in, of_slope, of_out = arrays.add_chunks(sums, dot, rows.shape[1])
    return out, of_in, of_slope, of_out


def sign_backward(
    grad: Tensor, x: Tensor, shift: Tensor | None, through: Tensor | None, surrogate: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """See `binarize.kernels.training.sign_backward`."""
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    rows = torch.zeros(1, x.shape[1], dtype=torch.float32, device="cpu") if shift is None else shift
    sums = np.zeros((count_chunks(x), x.shape[1]), np.float32)
    added, kind = as_array(out if through is None else through), _SURROGATES[surrogate]
    sizes = count_chunks(x), x.shape[2] * x.shape[3], row_sizes(x, len(rows))[1]
    inputs = as_array(grad), as_array(x), as_rows(rows), added, through is not None, kind
    run_loop(_sign_backward, *sizes, *inputs, as_array(out), sums)
    return out, None if shift is None else arrays.add_chunks(sums, x, rows.shape[0])


def _filters(weight: Tensor) -> Any:
    return weight.detach().contiguous().view(weight.shape[0], -1).numpy()


class PackedWeight(NamedTuple):
    """The signs of latent weights as bits."""

    filters: Tensor
    correction: Tensor
    shape: FilterShape


def pack(weight: Tensor, groups: int) -> PackedWeight:
    """Pack the signs of float32 weights ``(C_out, C_in / groups, kh, kw)``, with sign(0) = +1."""
    out_channels, in_channels, kh, kw = weight.shape
    shape = FilterShape(out_channels, in_channels, (kh, kw), groups)
    if groups > 1:
        filters = from_bits((weight.detach() >= 0).to(torch.uint8).unsqueeze(0), shape)[0]
        return PackedWeight(filters, padding_correction(filters, shape, unsigned=False), shape)
    filters = torch.zeros(shape.memory[1:], dtype=torch.int32, device="cpu")
    correction = torch.zeros(1 + kh * kw, shape.lanes, dtype=torch.int32, device="cpu")
    correction[0] = kh * kw * in_channels
    run_loop(_pack, out_channels, _filters(weight), kh * kw, filters.numpy().view(np.uint32), correction[1:].numpy())
    return PackedWeight(filters, correction, shape)


def binary_conv(
    x: Tensor, weight: PackedWeight, shift: Tensor | None, geometry: Geometry, transform: OutputTransform | None = None
) -> Tensor:
    """Return ``transform(conv(sign(x + shift), sign(weight)))`` in x's dtype, computed by counting bits.

    ``shift`` is ``(1 or B, C_in)`` or None. The transform's rows stand in place of timestep groups.
    """
    thresholds = (
        torch.zeros(1, x.shape[1], dtype=torch.float32, device="cpu") if shift is None else -shift.detach().float()
    )
    transform = OutputTransform() if transform is None else transform
    filters, correction, shape = weight
    layer = BinaryConv.lay_out(filters, shape, geometry, thresholds, transform, correction=correction)
    rows = len(layer.thresholds)
    return conv.run(x, layer, torch.arange(rows) if rows > 1 else None)


def scaled_codes(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return scale * sign(weight), sign(0) being 1, for float32 weights."""
    out = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    run_loop(_scaled_codes, weight.shape[0], _filters(weight), _scale(scale, weight.shape[0]), _filters(out))
    return out


def clip_(grad: Tensor, weight: Tensor) -> Tensor:
    """Set a contiguous gradient to zero where the weight is outside [-1, 1], in place."""
    run_loop(_clip, weight.shape[0], _filters(weight), _filters(grad))
    return grad
