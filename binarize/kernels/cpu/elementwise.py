"""The steps of `binarize.kernels.training` in one pass each over channels_last memory, compiled by numba for this CPU.

Tensors are seen as ``(pixels, C)`` arrays. bfloat16 ones come as their bits in uint16 and are computed in float32. Sums
over pixels are taken in float32 over `CHUNK` pixels, and in float64 over these sums.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from binarize.kernels.bitpack import LANES, FilterShape, from_bits
from binarize.kernels.cpu import conv as _cpu
from binarize.kernels.cpu import winograd as _winograd
from binarize.kernels.cpu.compile import cached
from binarize.kernels.cpu.loops import run
from binarize.kernels.ops import Geometry as PackedGeometry
from binarize.kernels.ops import count_filters, lay_out_table, lay_out_thresholds
from binarize.kernels.signs import SignZero
from binarize.kernels.training import SAME_3X3

CHUNK = 128

_SURROGATES = {"identity": 0, "clip": 1, "approx": 2}


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typingctx: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _get(array: Any, i: int, c: int) -> Any:
    """Read a number as float32; uint16 are the bits of bfloat16, uint8 is what `encode` wrote."""
    raise NotImplementedError  # pragma: no cover - replaced in compiled code


@overload(_get)
def _get_compiled(array: Any, i: Any, c: Any) -> Any:
    if array.dtype == types.uint16:

        def get(array: Any, i: Any, c: Any) -> Any:
            return _as_float(np.uint32(np.uint32(array[i, c]) << np.uint32(16)))

        return get
    if array.dtype == types.uint8:

        def get_code(array: Any, i: Any, c: Any) -> Any:
            return (np.float32(array[i, c]) - np.float32(127.5)) * np.float32(1 / 127)

        return get_code

    def get_plain(array: Any, i: Any, c: Any) -> Any:
        return np.float32(array[i, c])

    return get_plain


def _set(array: Any, i: int, c: int, value: float) -> None:
    """Write a float32, rounded to nearest even where the array is bfloat16; NaNs of arithmetic, 0x7FC00000, stay so."""
    raise NotImplementedError  # pragma: no cover - replaced in compiled code


@overload(_set)
def _set_compiled(array: Any, i: Any, c: Any, value: Any) -> Any:
    if array.dtype == types.uint16:

        def put(array: Any, i: Any, c: Any, value: Any) -> None:
            bits = _as_bits(np.float32(value))
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
            array[i, c] = np.uint16(rounded >> np.uint32(16))

        return put

    def put_plain(array: Any, i: Any, c: Any, value: Any) -> None:
        array[i, c] = value

    return put_plain


_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def _compile(function: Any) -> Any:
    return cached(lambda cache: njit(cache=cache, **_OPTIONS)(function))


@_compile
def _signs(start: int, stop: int, per_row: int, x: Any, shift: Any, at_zero: float, out: Any) -> None:
    channels = x.shape[1]
    signed = np.empty(channels, np.float32)
    above, zero, below = np.float32(1), np.float32(0), np.float32(-1)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row = shift[i // per_row]
        for c in range(channels):
            v = _get(x, i, c) + row[c]
            low = below if v < zero else v + at_zero  # 0, or a NaN that stays one
            signed[c] = above if v > zero else low
        for c in range(channels):
            _set(out, i, c, signed[c])


@_compile
def _encode(start: int, stop: int, per_row: int, x: Any, shift: Any, out: Any) -> None:
    channels = x.shape[1]
    v = np.empty(channels, np.float32)
    one, steps, last = np.float32(1), np.float32(127), np.float32(126)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        row = shift[i // per_row]
        for c in range(channels):
            v[c] = _get(x, i, c) + row[c]
        for c in range(channels):
            size = abs(v[c])
            inside = np.int32(min(size * steps, last))
            step = inside if size <= one else np.int32(127)
            out[i, c] = np.uint8(np.int32(128) + step if v[c] >= 0 else np.int32(127) - step)


@_compile
def _activate(
    start: int, stop: int, per_row: int, dot: Any, scale: Any, rows: Any, shortcut: Any, add: bool, out: Any
) -> None:
    channels = dot.shape[1]
    active = np.empty(channels, np.float32)
    zero = np.float32(0)
    for i in range(start * CHUNK, min(stop * CHUNK, dot.shape[0])):
        shift_in, slope, shift_out = rows[0, i // per_row], rows[1, i // per_row], rows[2, i // per_row]
        for c in range(channels):
            u, s = _get(dot, i, c) * scale[c] + shift_in[c], slope[c]
            active[c] = (u if u > zero else u * s) + shift_out[c]
        if add:
            for c in range(channels):
                _set(out, i, c, active[c] + _get(shortcut, i, c))
        else:
            for c in range(channels):
                _set(out, i, c, active[c])


@_compile
def _activate_backward(
    start: int,
    stop: int,
    per_sample: int,
    per_row: int,
    grad: Any,
    dot: Any,
    scale: Any,
    rows: Any,
    out: Any,
    sums: Any,
) -> None:
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
                u, s, g = _get(dot, i, c) * scale[c] + shift_in[c], slope[c], _get(grad, i, c)
                inner = g if u > 0 else g * s
                of_in[c] += inner
                of_slope[c] += np.float32(0) if u > 0 else g * u
                of_out[c] += g
                _set(out, i, c, inner)


@_compile
def _sign_backward(
    start: int,
    stop: int,
    per_sample: int,
    per_row: int,
    grad: Any,
    x: Any,
    shift: Any,
    through: Any,
    add: bool,
    kind: int,
    out: Any,
    sums: Any,
) -> None:
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
                    slope = two - two * abs(_get(x, i, c) + row[c])
                    inner[c] = _get(grad, i, c) * (slope if slope > zero else zero)
            elif kind == 1:
                for c in range(channels):
                    inner[c] = _get(grad, i, c) * (one if abs(_get(x, i, c) + row[c]) <= one else zero)
            else:
                for c in range(channels):
                    inner[c] = _get(grad, i, c)
            for c in range(channels):
                of_shift[c] += inner[c]
            if add:
                for c in range(channels):
                    _set(out, i, c, inner[c] + _get(through, i, c))
            else:
                for c in range(channels):
                    _set(out, i, c, inner[c])


@njit(inline="never", error_model="numpy", boundscheck=False)
def _sigmoid(y: Any) -> Any:
    # exp(z) = 2^n exp(r) with |r| <= ln(2) / 2 and a polynomial for exp(r) (Cephes' coefficients); libm's does not
    # vectorise here. Relative error below 2e-7.
    z = min(max(-y, np.float32(-87.0)), np.float32(87.0))
    n = (z * np.float32(1.44269504) + np.float32(12582912.0)) - np.float32(12582912.0)
    r = (z - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    power = _as_float(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))
    return np.float32(1) / (np.float32(1) + p * power)


@njit(inline="never", error_model="numpy", boundscheck=False)
def _hash(x: Any, key: Any) -> Any:
    # Two rounds of a 32-bit mixer with a key between them: every bit of the counter reaches every bit of the result.
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) + key)
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_compile
def _moments(start: int, stop: int, per_sample: int, x: Any, sums: Any) -> None:
    channels = x.shape[1]
    chunks = (per_sample + CHUNK - 1) // CHUNK
    for chunk in range(start, stop):
        sample, part = chunk // chunks, chunk % chunks
        first = sample * per_sample + part * CHUNK
        last = min(first + CHUNK, (sample + 1) * per_sample)
        total, squares, near = sums[0, chunk], sums[1, chunk], sample * per_sample
        for i in range(first, last):
            for c in range(channels):
                d = _get(x, i, c) - _get(x, near, c)  # so that a large mean costs no digits
                total[c] += d
                squares[c] += d * d


@_compile
def _norm_silu(
    start: int, stop: int, per_sample: int, x: Any, factors: Any, keys: Any, limit: int, boost: float, out: Any
) -> None:
    channels = x.shape[1]
    active = np.empty(channels, np.float32)
    zero = np.float32(0)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        factor, offset = factors[0, i // per_sample], factors[1, i // per_sample]
        for c in range(channels):
            y = _get(x, i, c) * factor[c] + offset[c]
            active[c] = y * _sigmoid(y)
        if limit > 0:
            base = np.uint32(np.uint32(i * channels) + keys[0])
            for c in range(channels):
                kept = _hash(np.uint32(base + np.uint32(c)), keys[1]) >= limit
                active[c] = active[c] * boost if kept else zero
        for c in range(channels):
            _set(out, i, c, active[c])


@_compile
def _norm_silu_inner(
    start: int,
    stop: int,
    per_sample: int,
    grad: Any,
    x: Any,
    factors: Any,
    whiten: Any,
    keys: Any,
    limit: int,
    boost: float,
    out: Any,
    sums: Any,
) -> None:
    channels = x.shape[1]
    inner = np.empty(channels, np.float32)
    one, zero = np.float32(1), np.float32(0)
    chunks = (per_sample + CHUNK - 1) // CHUNK
    for chunk in range(start, stop):
        sample, part = chunk // chunks, chunk % chunks
        first = sample * per_sample + part * CHUNK
        last = min(first + CHUNK, (sample + 1) * per_sample)
        factor, offset, rstd, mean = factors[0, sample], factors[1, sample], whiten[0, sample], whiten[1, sample]
        of_bias, of_weight = sums[0, chunk], sums[1, chunk]
        for i in range(first, last):
            for c in range(channels):
                inner[c] = _get(grad, i, c)
            if limit > 0:
                base = np.uint32(np.uint32(i * channels) + keys[0])
                for c in range(channels):
                    kept = _hash(np.uint32(base + np.uint32(c)), keys[1]) >= limit
                    inner[c] = inner[c] * boost if kept else zero
            for c in range(channels):
                y = _get(x, i, c) * factor[c] + offset[c]
                s = _sigmoid(y)
                inner[c] *= s * (one + y * (one - s))
            for c in range(channels):
                of_bias[c] += inner[c]
                of_weight[c] += inner[c] * ((_get(x, i, c) - mean[c]) * rstd[c])
            for c in range(channels):
                _set(out, i, c, inner[c])


@_compile
def _norm_outer(start: int, stop: int, per_sample: int, x: Any, terms: Any, out: Any) -> None:
    channels = x.shape[1]
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        of_grad, of_x, constant = terms[0, i // per_sample], terms[1, i // per_sample], terms[2, i // per_sample]
        for c in range(channels):
            _set(out, i, c, of_grad[c] * _get(out, i, c) + of_x[c] * _get(x, i, c) + constant[c])


@_compile
def _pack(start: int, stop: int, weight: Any, taps: int, out: Any, counts: Any) -> None:
    # weight (C_out, C_in * taps); out (blocks, taps * words, 16) as binarize.packed has filters; counts
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


@_compile
def _scaled_codes(start: int, stop: int, weight: Any, scale: Any, out: Any) -> None:
    for o in range(start, stop):
        above = scale[o]
        below = -above
        for i in range(weight.shape[1]):
            out[o, i] = above if weight[o, i] >= 0 else below


@_compile
def _clip(start: int, stop: int, weight: Any, grad: Any) -> None:
    zero = np.float32(0)
    for o in range(start, stop):
        for i in range(weight.shape[1]):
            grad[o, i] = grad[o, i] if abs(weight[o, i]) <= 1 else zero


def _array(x: Tensor) -> Any:
    """See ``(B, C, H, W)`` in channels_last memory as ``(B H W, C)``."""
    flat = x.detach().permute(0, 2, 3, 1).view(-1, x.shape[1])
    return (flat.view(torch.uint16) if x.dtype == torch.bfloat16 else flat).numpy()


def _rows(rows: Tensor) -> Any:
    return rows.detach().to(torch.float32).contiguous().numpy()


def _per_row(x: Tensor, rows: int) -> int:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return max(pixels // rows, 1)


def _chunks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[2] * x.shape[3] // CHUNK)


def _sums(sums: Any, x: Tensor, rows: int) -> Tensor:
    """Add what each chunk summed, ``(..., chunks, C)``, to rows ``(..., R, C)``."""
    total = torch.from_numpy(sums)
    total = total.view(*total.shape[:-2], rows, -1, total.shape[-1])
    return total.sum(-2, dtype=torch.float64).to(torch.float32)


def signs(x: Tensor, shift: Tensor | None, zero: SignZero, dtype: torch.dtype) -> Tensor:
    """`binarize.kernels.training.signs`."""
    shift = x.new_zeros(1, x.shape[1]) if shift is None else shift
    out = torch.empty_like(x, dtype=dtype)
    at_zero = np.float32(1 if zero == "plus" else 0)
    chunks = -(-x.numel() // x.shape[1] // CHUNK)
    run(_signs, chunks, _per_row(x, shift.shape[0]), _array(x), _rows(shift), at_zero, _array(out))
    return out


def encode(x: Tensor, shift: Tensor | None) -> Tensor:
    """`binarize.kernels.training.encode`."""
    shift = x.new_zeros(1, x.shape[1]) if shift is None else shift
    out = torch.empty_like(x, dtype=torch.uint8)
    chunks = -(-x.numel() // x.shape[1] // CHUNK)
    run(_encode, chunks, _per_row(x, shift.shape[0]), _array(x), _rows(shift), _array(out))
    return out


def _scale(scale: Tensor | None, channels: int) -> Any:
    return np.ones(channels, np.float32) if scale is None else _rows(scale)


def activate(dot: Tensor, scale: Tensor | None, post: Any, shortcut: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`binarize.kernels.training.activate`."""
    out = torch.empty_like(dot, dtype=dtype)
    rows, factors = _rows(torch.stack(list(post))), _scale(scale, dot.shape[1])
    added = _array(out if shortcut is None else shortcut)
    chunks = -(-dot.numel() // dot.shape[1] // CHUNK)
    per_row = _per_row(dot, rows.shape[1])
    run(_activate, chunks, per_row, _array(dot), factors, rows, added, shortcut is not None, _array(out))
    return out


def activate_backward(
    grad: Tensor, dot: Tensor, scale: Tensor | None, post: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`binarize.kernels.training.activate_backward`."""
    out = torch.empty_like(grad, dtype=dtype)
    rows, factors = _rows(torch.stack(list(post))), _scale(scale, dot.shape[1])
    sums = np.zeros((3, _chunks(dot), dot.shape[1]), np.float32)
    sizes = dot.shape[2] * dot.shape[3], _per_row(dot, rows.shape[1])
    run(_activate_backward, _chunks(dot), *sizes, _array(grad), _array(dot), factors, rows, _array(out), sums)
    of_in, of_slope, of_out = _sums(sums, dot, rows.shape[1])
    return out, of_in, of_slope, of_out


def sign_backward(
    grad: Tensor, x: Tensor, shift: Tensor | None, through: Tensor | None, surrogate: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`binarize.kernels.training.sign_backward`."""
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    rows = torch.zeros(1, x.shape[1], dtype=torch.float32) if shift is None else shift
    sums = np.zeros((_chunks(x), x.shape[1]), np.float32)
    run(
        _sign_backward,
        _chunks(x),
        x.shape[2] * x.shape[3],
        _per_row(x, rows.shape[0]),
        _array(grad),
        _array(x),
        _rows(rows),
        _array(out if through is None else through),
        through is not None,
        _SURROGATES[surrogate],
        _array(out),
        sums,
    )
    return out, None if shift is None else _sums(sums, x, rows.shape[0])


class Dropping(NamedTuple):
    """Which elements a dropout drops: those whose hash under two keys is below a limit."""

    keys: Any
    limit: Any
    boost: Any


def dropping(p: float) -> Dropping:
    """Draw the keys of a dropout from torch's generator."""
    keys = torch.randint(2**32, (2,)).numpy().astype(np.uint32) if p > 0 else np.zeros(2, np.uint32)
    return Dropping(keys, np.uint32(min(round(p * 2**32), 2**32 - 1)), np.float32(1 / (1 - p)))


class Normed(NamedTuple):
    """Statistics of a GroupNorm, expanded to channels, ``(B, C)``, float64."""

    mean: Tensor
    rstd: Tensor


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def moments(x: Tensor, groups: int, eps: float) -> Normed:
    """Return mean and 1 / standard deviation of each sample's groups."""
    b, channels = x.shape[:2]
    sums = np.zeros((2, _chunks(x), channels), np.float32)
    run(_moments, _chunks(x), _pixels(x), _array(x), sums)
    total, squares = torch.from_numpy(sums).view(2, b, -1, channels).sum(2, dtype=torch.float64) / _pixels(x)
    mean = total + x[:, :, 0, 0].double()
    spread = squares - total.square()
    of_group = mean.view(b, groups, -1).mean(2, keepdim=True)
    variance = (spread.view(b, groups, -1) + (mean.view(b, groups, -1) - of_group).square()).mean(2, keepdim=True)
    size = channels // groups
    rstd = (variance.clamp_min(0) + eps).rsqrt()
    return Normed(of_group.expand(-1, -1, size).reshape(b, -1), rstd.expand(-1, -1, size).reshape(b, -1))


def _factors(normed: Normed, weight: Tensor, bias: Tensor) -> Any:
    factor = normed.rstd * weight.detach().double()
    return torch.stack([factor, bias.detach().double() - normed.mean * factor]).float().numpy()


def norm_silu(x: Tensor, normed: Normed, weight: Tensor, bias: Tensor, drop: Dropping) -> Tensor:
    """Return dropout(silu(norm(x))) in x's dtype."""
    out = torch.empty_like(x)
    chunks = -(-x.numel() // x.shape[1] // CHUNK)
    run(_norm_silu, chunks, _pixels(x), _array(x), _factors(normed, weight, bias), *drop, _array(out))
    return out


def norm_silu_backward(
    grad: Tensor, x: Tensor, normed: Normed, weight: Tensor, bias: Tensor, drop: Dropping, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    b, channels = x.shape[:2]
    out = torch.empty_like(x)
    sums = np.zeros((2, _chunks(x), channels), np.float32)
    whiten = torch.stack([normed.rstd, normed.mean]).float().numpy()
    sources = _array(grad), _array(x), _factors(normed, weight, bias), whiten
    run(_norm_silu_inner, _chunks(x), _pixels(x), *sources, *drop, _array(out), sums)
    of_bias, of_weight = torch.from_numpy(sums).view(2, b, -1, channels).sum(2, dtype=torch.float64)
    scaled = torch.stack([of_bias, of_weight]) * weight.detach().double()
    first, second = scaled.view(2, b, groups, -1).mean(3, keepdim=True).expand(
        -1, -1, -1, channels // groups
    ) / _pixels(x)
    first, second = first.reshape(b, channels), second.reshape(b, channels)
    of_x = -normed.rstd.square() * second
    constant = -normed.rstd * first - of_x * normed.mean
    terms = torch.stack([normed.rstd * weight.detach().double(), of_x, constant]).float().numpy()
    chunks = -(-x.numel() // channels // CHUNK)
    run(_norm_outer, chunks, _pixels(x), _array(x), terms, _array(out))
    return out, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)


def _filters(weight: Tensor) -> Any:
    return weight.detach().contiguous().view(weight.shape[0], -1).numpy()


class Packed(NamedTuple):
    """Signs of weights as the kernel of `binarize.packed` has them."""

    filters: Tensor
    counts: Tensor
    shape: FilterShape


def pack(weight: Tensor, groups: int) -> Packed:
    """Return the signs of float32 weights ``(C_out, C_in / groups, kh, kw)`` as bits, sign(0) being 1."""
    out_channels, in_channels, kh, kw = weight.shape
    shape = FilterShape(out_channels, in_channels, (kh, kw), groups)
    if groups > 1:
        filters = from_bits((weight.detach() >= 0).to(torch.uint8).unsqueeze(0), shape)[0]
        return Packed(filters, count_filters(filters, shape, False), shape)
    filters = torch.zeros(shape.memory[1:], dtype=torch.int32)
    counts = torch.zeros(1 + kh * kw, shape.lanes, dtype=torch.int32)
    counts[0] = kh * kw * in_channels
    run(_pack, out_channels, _filters(weight), kh * kw, filters.numpy().view(np.uint32), counts[1:].numpy())
    return Packed(filters, counts, shape)


def packed_conv(
    x: Tensor,
    packed: Packed,
    shift: Tensor | None,
    geometry: Any,
    scale: Tensor | None = None,
    post: Any = None,
    shortcut: bool = False,
) -> Tensor:
    """Return RPReLU(scale * conv(sign(x + b))) + shortcut in x's dtype by the xnor-popcount kernel.

    Args:
        x: ``(B, C_in, H, W)``.
        packed: The filters.
        shift: Rows b, or None.
        geometry: The convolution's.
        scale: ``(C_out,)`` or None for 1.
        post: The RPReLU's rows, or None for the identity.
        shortcut: Whether to add x.
    """
    shape, (top, left) = packed.shape, geometry.padding
    columns = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]).view(6, 1, 1)
    columns = columns.repeat(1, 1 if post is None else post.slope.shape[0], shape.out_channels)
    if scale is not None:
        columns[0] = scale
    if post is not None:
        columns[3], columns[4], columns[5] = (rows.detach() for rows in post)
    limits = torch.zeros(1, x.shape[1], dtype=torch.float32) if shift is None else -shift.detach().float()
    rows = max(columns.shape[1], limits.shape[0])
    table = lay_out_table(columns.expand(-1, rows, -1).contiguous(), shape)
    thresholds = lay_out_thresholds(limits.expand(rows, -1).contiguous(), shape)
    return _cpu.packed_conv2d(
        x,
        packed.filters,
        packed.counts,
        thresholds,
        table,
        torch.arange(rows) if rows > 1 else None,
        shape,
        PackedGeometry(geometry.stride, (left, left, top, top), geometry.dilation),
        halve=False,
        low=-math.inf,
        high=math.inf,
        shortcut=int(shortcut),
        norm=None,
        row=None,
        residual=None,
    )


def wide_fits(x: Tensor, weight: Tensor, geometry: Any) -> bool:
    """Say whether `wide_conv` and `wide_conv_of_weight` do a convolution, and faster than torch does."""
    return (
        _winograd.TRAINS_WIDE
        and (geometry == SAME_3X3 and weight.shape[2:] == (3, 3) and weight.dtype == torch.float32)
        and all(width % LANES == 0 and width >= 2 * LANES for width in weight.shape[:2])
        and _winograd.wide_pays(x)
    )


def wide_conv(x: Tensor, weight: Tensor, bias: Tensor | None, coarse: bool) -> Tensor:
    """Return the 3x3 convolution of ``x`` with padding 1, in x's dtype.

    Args:
        x: ``(B, C_in, H, W)``, float32, or bfloat16 if coarse.
        weight: ``(C_out, C_in, 3, 3)`` float32.
        bias: ``(C_out,)`` or None.
        coarse: Whether the result may be off by 1e-5 of its size.
    """
    return _winograd.wide_conv(x, weight, bias, None, None, _tile(x, coarse))


def wide_conv_of_input(grad: Tensor, weight: Tensor, coarse: bool) -> Tensor:
    """Return the gradient of the input of `wide_conv`, from its output's."""
    return _winograd.wide_conv(grad, weight, None, None, None, _tile(grad, coarse), transposed=True)


def wide_conv_of_weight(x: Tensor, grad: Tensor, coarse: bool) -> Tensor:
    """Return the gradient of the weights of `wide_conv`, from its float32 input and its output's gradient."""
    return _winograd.wide_conv_of_weight(x, grad, _tile(x, coarse))


def _tile(x: Tensor, coarse: bool) -> Literal[2, 4]:
    # Transforms of weights do not pay for few large tiles.
    few = x.shape[0] * x.shape[2] * x.shape[3] < 2048 and x.dtype == torch.float32
    return 4 if coarse and not few else 2


def scaled_codes(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return scale * sign(weight), sign(0) being 1, for float32 weights."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    run(_scaled_codes, weight.shape[0], _filters(weight), _scale(scale, weight.shape[0]), _filters(out))
    return out


def clip_(grad: Tensor, weight: Tensor) -> Tensor:
    """Set a contiguous gradient to zero where the weight is outside [-1, 1], in place."""
    run(_clip, weight.shape[0], _filters(weight), _filters(grad))
    return grad
