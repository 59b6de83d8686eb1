"""Sign functions and uniform quantizers of activations, with the surrogate gradients of published binarizers.

Sign functions map to {-1, +1} (or {0, 1} for DoReFa's activation) and differ only in the backward. ``zero`` is the
value of sign(0): "plus" gives +1, so that every value fits one bit; "zero" gives torch.sign's 0, with which the
checkpoints of the original repositories were trained. For the backward, identity_sign saves nothing, approx_sign and
ede_sign save x itself, and the others save one byte per element.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from binarize.kernels.capture import is_transformed

SignZero = Literal["plus", "zero"]


def hard_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """Return sign(x) in x's dtype, without a gradient; sign(0) is +1 ("plus") or 0 ("zero"), and NaN stays NaN."""
    return _round_up(torch.sign(x.detach()), zero)


def sign_(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """`hard_sign` in place."""
    return _round_up(x.sign_(), zero)


def _round_up(signs: Tensor, zero: SignZero) -> Tensor:
    # On a CPU, many times faster than torch.where with two numbers.
    return signs if zero == "zero" else signs.add_(0.5).sign_()


def straight_through(values: Tensor, smooth: Tensor) -> Tensor:
    """Return the values with all derivatives of ``smooth``, by plain operators; see `binarize.kernels.capture`."""
    return values.detach() + (smooth - smooth.detach())


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: str, zero: SignZero) -> Tensor:
        ctx.surrogate = surrogate
        if surrogate != "identity":
            ctx.save_for_backward(x.abs() <= 1 if surrogate == "clip" else x)
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.surrogate == "identity":
            return grad, None, None
        (saved,) = ctx.saved_tensors
        return grad * (saved if ctx.surrogate == "clip" else (2 - 2 * saved.abs()).clamp_min(0)), None, None


class _EDESign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor, zero: SignZero) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, t, k = ctx.saved_tensors
        return grad * (k * t) * (1 - torch.tanh(t * x).square()), None, None, None


class _Masked(torch.autograd.Function):
    """x, or x rounded to one of so many steps in [0, 1]; the gradient passes where x is in [-1, 1], or in [0, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward((x >= 0) & (x <= 1) if steps else x.abs() <= 1)
        return _round_to(x, steps) if steps else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _round_to(x: Tensor, steps: int) -> Tensor:
    clipped = x.clamp(0, 1)
    return clipped.round() if steps == 1 else (clipped * steps).round() / steps


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.range, ctx.gradient_scale = (low, high), gradient_scale
        return (x / step).clamp(low, high).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (x, step), (low, high) = ctx.saved_tensors, ctx.range
        inside, slope = _step_slopes(x / step, low, high)
        return grad * inside, (grad * slope).sum() * ctx.gradient_scale, None, None, None


def _step_slopes(ratio: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return where x passes its gradient on, and the derivative by the step; ``ratio`` is x / step."""
    inside = (ratio > low) & (ratio < high)
    return inside, ratio.clamp(low, high).round() - torch.where(inside, ratio, 0.0)


def clipped_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """STE-clip: forward sign(x); backward g * 1{|x| <= 1} (Hubara et al. 2016, "Binarized Neural Networks", eq. 4)."""
    if is_transformed():
        return straight_through(hard_sign(x, zero), x.clamp(-1, 1))
    return _Sign.apply(x, "clip", zero)


def approx_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """ApproxSign: forward sign(x); backward g * max(0, 2 - 2|x|) (Liu et al. 2018, "Bi-Real Net", eq. 7)."""
    if is_transformed():
        inside = x.clamp(-1, 1)
        return straight_through(hard_sign(x, zero), inside * (2 - inside.abs()))
    return _Sign.apply(x, "approx", zero)


def identity_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """Straight-through sign: forward sign(x); backward g."""
    if is_transformed():
        return straight_through(hard_sign(x, zero), x)
    return _Sign.apply(x, "identity", zero)


def ede_sign(x: Tensor, t: Tensor, k: Tensor, zero: SignZero = "plus") -> Tensor:
    """Error decay estimator: forward sign(x); backward g * k t (1 - tanh^2(t x)) (Qin et al. 2020, "IR-Net", eq. 11).

    ``t``, the steepness of the estimator, and ``k``, max(1 / t, 1), are scalar tensors.
    """
    if is_transformed():
        return straight_through(hard_sign(x, zero), k * torch.tanh(t * x))
    return _EDESign.apply(x, t, k, zero)


def unit_round(x: Tensor, bits: int = 1) -> Tensor:
    """DoReFa's k-bit activation: forward round(n clip(x, 0, 1)) / n with n = 2^k - 1; backward g * 1{0 <= x <= 1}.

    Ties are rounded to even (Zhou et al. 2016, eqs. 5 and 11).
    """
    steps = 2**bits - 1
    if is_transformed():
        return straight_through(_round_to(x.detach(), steps), x.clamp(0, 1))
    return _Masked.apply(x, steps)


def learned_step(x: Tensor, step: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
    """LSQ: forward round(clip(x / s, low, high)) s; ties to even (Esser et al. 2020, eqs. 1 and 2).

    Backward, by x: g * 1{low < x / s < high}. By the step s, times ``gradient_scale``: the sum of g * (round(x / s) -
    x / s) inside that range, g * low below and g * high above it (eqs. 3 and 5). ``step`` is a positive scalar.
    """
    if is_transformed():
        ratio = (x / step).detach()
        inside, slope = _step_slopes(ratio, low, high)
        smooth = x * inside + step * (slope * gradient_scale)
        return straight_through(ratio.clamp(low, high).round() * step.detach(), smooth)
    return _LearnedStep.apply(x, step, low, high, gradient_scale)


def clipped_identity(x: Tensor) -> Tensor:
    """Forward x; backward g * 1{|x| <= 1}: for a latent weight whose sign is taken elsewhere."""
    if is_transformed():
        return straight_through(x, x.clamp(-1, 1))
    return _Masked.apply(x, 0)
