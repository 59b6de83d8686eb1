"""Activation binarizers: modules that map their input to two values, or to few, and define a surrogate gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.capture import is_transformed
from binarize.kernels.signs import (
    SignZero,
    approx_sign,
    clipped_sign,
    ede_sign,
    hard_sign,
    identity_sign,
    straight_through,
    unit_round,
)  # fmt: skip
from binarize.layers.parts import ActivationBinarizer, LayerSpec, feature_dims, register_part, with_sign_zero
from binarize.layers.schedule import Scheduled, check_ede_range, ede_schedule


class _Sign(ActivationBinarizer):
    """Base class of the activations whose forward is sign(x)."""

    levels = (-1, 1)
    function: Any  # (x, sign_zero) -> signs

    def __init__(self, sign_zero: SignZero = "plus") -> None:
        super().__init__()
        self.sign_zero: SignZero = sign_zero

    def extra_repr(self) -> str:
        return f"sign_zero={self.sign_zero!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to {-1, +1} of the same shape."""
        return type(self).function(x, self.sign_zero)


class ClippedSign(_Sign):
    """Forward sign(x); backward g * 1{|x| <= 1} (STE-clip; BNN, XNOR-Net)."""

    surrogate, function = "clip", staticmethod(clipped_sign)


class IdentitySign(_Sign):
    """Forward sign(x); backward g, the original straight-through estimator (Courbariaux et al. 2016)."""

    surrogate, function = "identity", staticmethod(identity_sign)


class ApproxSign(_Sign):
    """Forward sign(x); backward g * max(0, 2 - 2|x|) (Bi-Real Net, ReActNet, BBCU, BI-DiffSR)."""

    surrogate, function = "approx", staticmethod(approx_sign)


class EDESign(Scheduled, _Sign):
    """Forward sign(x); backward g * k t (1 - tanh^2(t x)), IR-Net's error decay estimator.

    t grows from ``t_min`` to ``t_max`` over training.
    """

    levels = (-1, 1)

    def __init__(self, sign_zero: SignZero = "plus", t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__(sign_zero)
        check_ede_range(type(self).__name__, t_min, t_max)
        self.t_min, self.t_max = t_min, t_max

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to {-1, +1} of the same shape."""
        t, k = ede_schedule(self.progress, self.t_min, self.t_max)
        return ede_sign(x, t, k, self.sign_zero)


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(mean)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mean,) = ctx.saved_tensors
        return torch.where(mean == 0, 0.0, grad / mean), None


class MeanClippedSign(_Sign):
    """Forward sign(x); backward g * 1{|x| <= 1} / mean |x|: goes with `InputMeanScale` (BiBench's form of XNOR-Net).

    BiBench binarizes to x_hat = mean |x| sign(x) and passes on the gradient of x_hat without the factor. Here the
    product of +-1 is scaled afterwards, which multiplies the gradient by the factor, so this divides by it. A sample
    that is zero everywhere has mean 0 and gets no gradient. The mean is over each sample with ``channel_dim`` 1, and
    over the last dimension, each token of a linear layer, with -1.
    """

    levels = (-1, 1)

    def __init__(self, sign_zero: SignZero = "plus", channel_dim: int = 1) -> None:
        super().__init__(sign_zero)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` or ``(..., C)`` to {-1, +1} of the same shape."""
        mean = x.detach().abs().mean(feature_dims(x, self.channel_dim), keepdim=True)
        if is_transformed():
            scaled = torch.where(mean == 0, 0.0, x.clamp(-1, 1) / mean)
            return straight_through(hard_sign(x, self.sign_zero), scaled)
        return clipped_sign(_MeanGradient.apply(x, mean), self.sign_zero)


def checked_bits(owner: str, bits: int, fewest: int) -> int:
    """Return ``bits`` if it is a whole number from ``fewest`` to 16; else raise BinarizeError."""
    if type(bits) is not int or not fewest <= bits <= 16:
        raise BinarizeError(f"{owner}: bits must be a whole number from {fewest} to 16; got {bits!r}.")
    return bits


class UnitRound(ActivationBinarizer):
    """Forward round(n clip(x, 0, 1)) / n, n = 2^bits - 1; backward g * 1{0 <= x <= 1} (DoReFa-Net, section 2.4)."""

    bits: int

    def __init__(self, bits: int = 1) -> None:
        super().__init__()
        self.bits = checked_bits("unit_round", bits, 1)
        self.levels = (0, 1) if bits == 1 else None
        self.plane_weights = tuple(1 << place for place in range(bits)) if bits <= 8 else ()

    def extra_repr(self) -> str:
        """Return ``bits`` for the module's repr."""
        return f"bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to multiples of 1 / n in [0, 1] of the same shape."""
        return unit_round(x, self.bits)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values times n, uint8, and 1 / n."""
        steps = 2**self.bits - 1
        return (x.clamp(0, 1) * steps).round().to(torch.uint8), x.new_tensor(1 / steps)


class NormalizedApproxSign(_Sign):
    """ApproxSign of a / sqrt(var(a) + 1e-5), the (unbiased) variance over each sample's features (ReCU).

    The gradient flows through the variance too. The division changes no sign, only the surrogate gradient, so it is
    skipped if no gradient is required. With ``channel_dim`` -1, the variance is over the last dimension, each token of
    a linear layer.
    """

    levels = (-1, 1)

    def __init__(self, sign_zero: SignZero = "plus", channel_dim: int = 1) -> None:
        super().__init__(sign_zero)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` or ``(..., C)`` to {-1, +1} of the same shape."""
        if (torch.is_grad_enabled() and x.requires_grad) or is_transformed():  # a tangent shows in neither
            x = self.normalize(x)
        return approx_sign(x, self.sign_zero)

    def normalize(self, x: Tensor) -> Tensor:
        """Return x / sqrt(var(x) + 1e-5), the input of the surrogate gradient."""
        dims = feature_dims(x, self.channel_dim)
        features = x.shape[1:].numel() if self.channel_dim == 1 else x.shape[-1]
        return x / torch.sqrt(x.var(dims, correction=min(1, features - 1), keepdim=True) + 1e-5)


register_part("activation", "ste")(with_sign_zero(ClippedSign))
register_part("activation", "mean_ste")(lambda spec: MeanClippedSign(spec.sign_zero, spec.channel_dim))
register_part("activation", "identity_ste")(with_sign_zero(IdentitySign))
register_part("activation", "approx_sign")(with_sign_zero(ApproxSign))
register_part("activation", "ede")(with_sign_zero(EDESign))
register_part("activation", "recu")(lambda spec: NormalizedApproxSign(spec.sign_zero, spec.channel_dim))


@register_part("activation", "unit_round")
def _unit_round(spec: LayerSpec, bits: int = 1) -> nn.Module:
    return UnitRound(bits)
