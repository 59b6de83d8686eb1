"""GroupNorm, SiLU and dropout in training, in two passes each way, compiled by numba.

The mask of the dropout comes from a hash of each element's index under two keys from torch's generator, so that the
backward computes it again instead of keeping it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from binarize.kernels.cpu.arrays import CHUNK, as_array, as_float, compiled, count_chunks, get, put, row_sizes
from binarize.kernels.cpu.threads import run_loop


@njit(inline="never", error_model="numpy", boundscheck=False)
def _sigmoid(y):  # type: ignore[no-untyped-def]
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
    power = as_float(np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))
    return np.float32(1) / (np.float32(1) + p * power)


@njit(inline="never", error_model="numpy", boundscheck=False)
def _hash(x, key):  # type: ignore[no-untyped-def]
    # Two rounds of a 32-bit mixer with a key between them: every bit of the counter reaches every bit of the result.
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) + key)
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def _moments(start, stop, per_sample, x, sums):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    chunks = (per_sample + CHUNK - 1) // CHUNK
    for chunk in range(start, stop):
        sample, part = chunk // chunks, chunk % chunks
        first = sample * per_sample + part * CHUNK
        last = min(first + CHUNK, (sample + 1) * per_sample)
        total, squares, near = sums[0, chunk], sums[1, chunk], sample * per_sample
        for i in range(first, last):
            for c in range(channels):
                d = get(x, i, c) - get(x, near, c)  # so that a large mean costs no digits
                total[c] += d
                squares[c] += d * d


@compiled
def _norm_silu(start, stop, per_sample, x, factors, keys, limit, boost, out):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    active = np.empty(channels, np.float32)
    zero = np.float32(0)
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        factor, offset = factors[0, i // per_sample], factors[1, i // per_sample]
        for c in range(channels):
            y = get(x, i, c) * factor[c] + offset[c]
            active[c] = y * _sigmoid(y)
        if limit > 0:
            base = np.uint32(np.uint32(i * channels) + keys[0])
            for c in range(channels):
                kept = _hash(np.uint32(base + np.uint32(c)), keys[1]) >= limit
                active[c] = active[c] * boost if kept else zero
        for c in range(channels):
            put(out, i, c, active[c])


@compiled
def _norm_silu_inner(start, stop, per_sample, grad, x, factors, whiten, keys, limit, boost, out, sums):  # type: ignore[no-untyped-def]
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
                inner[c] = get(grad, i, c)
            if limit > 0:
                base = np.uint32(np.uint32(i * channels) + keys[0])
                for c in range(channels):
                    kept = _hash(np.uint32(base + np.uint32(c)), keys[1]) >= limit
                    inner[c] = inner[c] * boost if kept else zero
            for c in range(channels):
                y = get(x, i, c) * factor[c] + offset[c]
                s = _sigmoid(y)
                inner[c] *= s * (one + y * (one - s))
            for c in range(channels):
                of_bias[c] += inner[c]
                of_weight[c] += inner[c] * ((get(x, i, c) - mean[c]) * rstd[c])
            for c in range(channels):
                put(out, i, c, inner[c])


@compiled
def _norm_outer(start, stop, per_sample, x, terms, out):  # type: ignore[no-untyped-def]
    channels = x.shape[1]
    for i in range(start * CHUNK, min(stop * CHUNK, x.shape[0])):
        of_grad, of_x, constant = terms[0, i // per_sample], terms[1, i // per_sample], terms[2, i // per_sample]
        for c in range(channels):
            put(out, i, c, of_grad[c] * get(out, i, c) + of_x[c] * get(x, i, c) + constant[c])


class Dropout(NamedTuple):
    """A drawn dropout: it drops the elements whose hash under two keys is below a limit."""

    keys: Any
    limit: Any
    boost: Any


def draw_dropout(p: float) -> Dropout:
    """Draw the keys of a dropout from torch's generator."""
    keys = torch.randint(2**32, (2,)).numpy().astype(np.uint32) if p > 0 else np.zeros(2, np.uint32)
    return Dropout(keys, np.uint32(min(round(p * 2**32), 2**32 - 1)), np.float32(1 / (1 - p)))


def kept_by_dropout(x: Tensor, dropout: Dropout) -> Tensor | None:
    """Return what a dropout multiplies a channels_last tensor of x's shape by, in float32; None if it drops nothing."""
    if dropout.limit == 0:
        return None
    images, channels = x.shape[0], x.shape[1]
    ones = torch.ones(x.shape, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    still = Moments(*torch.zeros(2, images, channels, dtype=torch.float64, device="cpu"))
    kept = norm_silu(ones, still, torch.zeros(channels, device="cpu"), torch.ones(channels, device="cpu"), dropout)
    return (kept > 0) * float(dropout.boost)


class Moments(NamedTuple):
    """Statistics of a GroupNorm, expanded to channels, ``(B, C)``, float64."""

    mean: Tensor
    rstd: Tensor


def moments(x: Tensor, groups: int, eps: float) -> Moments:
    """Return mean and 1 / standard deviation of each sample's groups."""
    b, channels = x.shape[:2]
    sums = np.zeros((2, count_chunks(x), channels), np.float32)
    run_loop(_moments, count_chunks(x), x.shape[2:].numel(), as_array(x), sums)
    total, squares = torch.from_numpy(sums).view(2, b, -1, channels).sum(2, dtype=torch.float64) / x.shape[2:].numel()
    mean = total + x[:, :, 0, 0].double()
    spread = squares - total.square()
    of_group = mean.view(b, groups, -1).mean(2, keepdim=True)
    variance = (spread.view(b, groups, -1) + (mean.view(b, groups, -1) - of_group).square()).mean(2, keepdim=True)
    size = channels // groups
    rstd = (variance.clamp_min(0) + eps).rsqrt()
    return Moments(of_group.expand(-1, -1, size).reshape(b, -1), rstd.expand(-1, -1, size).reshape(b, -1))


def _factors(moments: Moments, weight: Tensor, bias: Tensor) -> Any:
    factor = moments.rstd * weight.detach().double()
    return torch.stack([factor, bias.detach().double() - moments.mean * factor]).float().numpy()


def norm_silu(x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, dropout: Dropout) -> Tensor:
    """Return dropout(silu(norm(x))) in x's dtype."""
    out = torch.empty_like(x)
    sizes = row_sizes(x, x.shape[0])
    run_loop(_norm_silu, *sizes, as_array(x), _factors(moments, weight, bias), *dropout, as_array(out))
    return out


def norm_silu_backward(
    grad: Tensor, x: Tensor, moments: Moments, weight: Tensor, bias: Tensor, dropout: Dropout, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    b, channels = x.shape[:2]
    out = torch.empty_like(x)
    sums = np.zeros((2, count_chunks(x), channels), np.float32)
    whiten = torch.stack([moments.rstd, moments.mean]).float().numpy()
    sources = as_array(grad), as_array(x), _factors(moments, weight, bias), whiten
    run_loop(_norm_silu_inner, count_chunks(x), x.shape[2:].numel(), *sources, *dropout, as_array(out), sums)
    of_bias, of_weight = torch.from_numpy(sums).view(2, b, -1, channels).sum(2, dtype=torch.float64)
    scaled = torch.stack([of_bias, of_weight]) * weight.detach().double()
    means = scaled.view(2, b, groups, -1).mean(3, keepdim=True) / x.shape[2:].numel()
    first, second = means.expand(-1, -1, -1, channels // groups).reshape(2, b, channels)
    of_x = -moments.rstd.square() * second
    constant = -moments.rstd * first - of_x * moments.mean
    terms = torch.stack([moments.rstd * weight.detach().double(), of_x, constant]).float().numpy()
    run_loop(_norm_outer, *row_sizes(x, b), as_array(x), terms, as_array(out))
    return out, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)
