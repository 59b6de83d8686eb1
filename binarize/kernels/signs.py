"""Sign functions and the surrogate gradients that published binarizers give them.

Every function maps to {-1, +1} (or {0, 1} for DoReFa's activation) and differs in its backward alone. ``zero`` says
what sign(0) is: "plus" gives +1, so that every value fits one bit; "zero" keeps torch.sign's 0, which checkpoints of
the PyTorch repositories were trained with.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

SignZero = Literal["plus", "zero"]


def hard_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """Return sign(x) in x's dtype, without a gradient; sign(0) is +1 ("plus") or 0 ("zero"), and NaN stays NaN."""
    return _round_up(torch.sign(x.detach()), zero)


def sign_(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """`hard_sign` in place."""
    return _round_up(x.sign_(), zero)


def _round_up(signs: Tensor, zero: SignZero) -> Tensor:
    # Many times faster on a CPU than torch.where with two numbers.
    return signs if zero == "zero" else signs.add_(0.5).sign_()


class _ClippedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: SignZero) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class _ApproxSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: SignZero) -> Tensor:
        ctx.save_for_backward(x)
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_min(0), None


class _IdentitySign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: SignZero) -> Tensor:
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _EDESign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, k: Tensor, zero: SignZero) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return hard_sign(x, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, t, k = ctx.saved_tensors
        return grad * (k * t) * (1 - torch.tanh(t * x).square()), None, None, None


class _UnitRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward((x >= 0) & (x <= 1))
        return x.clamp(0, 1).round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grad * inside


class _ClippedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return grad * inside


def clipped_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """STE-clip: forward sign(x); backward g * 1{|x| <= 1} (Hubara et al. 2016, "Binarized Neural Networks", eq. 4).

    Saves one byte an element for the backward.
    """
    return _ClippedSign.apply(x, zero)


def approx_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """ApproxSign: forward sign(x); backward g * max(0, 2 - 2|x|) (Liu et al. 2018, "Bi-Real Net", eq. 7).

    Saves x itself for the backward, no copy of it.
    """
    return _ApproxSign.apply(x, zero)


def identity_sign(x: Tensor, zero: SignZero = "plus") -> Tensor:
    """Straight-through sign: forward sign(x); backward g. Saves nothing."""
    return _IdentitySign.apply(x, zero)


def ede_sign(x: Tensor, t: Tensor, k: Tensor, zero: SignZero = "plus") -> Tensor:
    """Error decay estimator: forward sign(x); backward g * k t (1 - tanh^2(t x)) (Qin et al. 2020, "IR-Net", eq. 11).

    Args:
        x: Any shape.
        t: Scalar tensor, the steepness of the estimator.
        k: Scalar tensor, max(1 / t, 1).
        zero: What sign(0) is.

    Saves x itself and the two scalars for the backward.
    """
    return _EDESign.apply(x, t, k, zero)


def unit_round(x: Tensor) -> Tensor:
    """DoReFa's 1-bit activation: forward round(clip(x, 0, 1)) in {0, 1}, ties to even; backward g * 1{0 <= x <= 1}.

    Saves one byte an element for the backward.
    """
    return _UnitRound.apply(x)


def clipped_identity(x: Tensor) -> Tensor:
    """Forward x; backward g * 1{|x| <= 1}: the graph of a latent weight whose sign is taken elsewhere.

    Saves one byte an element for the backward.
    """
    return _ClippedIdentity.apply(x)
