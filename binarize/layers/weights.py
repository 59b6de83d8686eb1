"""Weight binarizers: modules that turn latent weights into +-1 codes, scales and a surrogate gradient.

Each one's ``forward(w)`` returns a `BinaryWeight`. ``w`` is ``(C_out, C_in / groups, kh, kw)`` or ``(C_out, C_in)``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from binarize.layers.parts import LayerSpec, register_part
from binarize.layers.product import BinaryWeight
from binarize.layers.schedule import Scheduled, ede_schedule
from binarize.layers.signs import SignZero, clipped_identity, clipped_sign, ede_sign, hard_sign


def _per_filter(w: Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.dim()))


def _column(values: Tensor, w: Tensor) -> Tensor:
    return values.view(-1, *[1] * (w.dim() - 1))


class _WeightBinarizer(nn.Module):
    terms = 1
    stored_scales: Literal["filter", "tensor", "none"] = "filter"

    def __init__(self, sign_zero: SignZero = "plus") -> None:
        super().__init__()
        self.sign_zero: SignZero = sign_zero

    def extra_repr(self) -> str:
        return f"sign_zero={self.sign_zero!r}"

    def _single(self, surrogate: Tensor, signed: Tensor, scale: Tensor) -> BinaryWeight:
        with torch.no_grad():
            codes = hard_sign(signed.detach(), self.sign_zero)
        return BinaryWeight(surrogate, codes.unsqueeze(0), scale.detach().unsqueeze(0))


class SignWeight(_WeightBinarizer):
    """w_hat = sign(w), no scale (BNN).

    Args:
        sign_zero: What sign(0) is.
        clip: Backward g * 1{|w| <= 1} (BiBench's form); otherwise the original identity.
    """

    stored_scales = "none"

    def __init__(self, sign_zero: SignZero = "plus", clip: bool = True) -> None:
        super().__init__(sign_zero)
        self.clip = clip

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        return self._single(clipped_identity(w) if self.clip else w, w, w.new_ones(w.shape[0]))


class ScaledSignWeight(_WeightBinarizer):
    """w_hat = alpha_o sign(w), alpha_o = mean |w| of the filter, detached; backward g * 1{|w| <= 1}.

    Bi-Real Net, ReActNet, BBCU, BiDM and BI-DiffSR. The gradient is not multiplied by alpha.
    """

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        return self._single(clipped_identity(w), w, w.detach().abs().mean(_per_filter(w)))


class TwoStageWeight(Scheduled, ScaledSignWeight):
    """Full-precision weights until ``switch`` of the training is done, then scaled signs (ReActNet's two stages).

    Args:
        sign_zero: What sign(0) is.
        switch: The progress at which weights become binary, in (0, 1].
    """

    def __init__(self, sign_zero: SignZero = "plus", switch: float = 0.5) -> None:
        super().__init__(sign_zero)
        self.switch = switch

    def forward(self, w: Tensor) -> BinaryWeight:
        """Return scaled signs, or the weights themselves with a scale of one in the first stage."""
        binary = super().forward(w)
        second = self.progress >= self.switch
        return BinaryWeight(
            torch.where(second, binary.surrogate, w),
            torch.where(second, binary.codes, w.detach().unsqueeze(0)),
            torch.where(second, binary.scales, torch.ones_like(binary.scales)),
        )


class _XnorGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, centred: Tensor, alpha: Tensor, sgd: bool) -> Tensor:
        ctx.save_for_backward(centred, alpha)
        ctx.sgd = sgd
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        centred, alpha = ctx.saved_tensors
        n = centred[0].numel()
        factor = (_column(alpha, centred) * (centred.abs() < 1) + 1 / n) * (1 - 1 / centred.shape[1])
        return grad * (factor * n if ctx.sgd else factor), None, None, None


class XnorWeight(_WeightBinarizer):
    """XNOR-Net: centre over the input channels, clamp to [-1, 1], w_hat = ||w||_1 / n * sign(w).

    The backward is the authors' released code's, g * (alpha 1{|w| < 1} + 1/n) (1 - 1/C_in) on the centred weights, with
    a further factor n under SGD.

    Args:
        sign_zero: What sign(0) is.
        sgd: Multiply the gradient by n, as the authors do with SGD.
    """

    def __init__(self, sign_zero: SignZero = "plus", sgd: bool = False) -> None:
        super().__init__(sign_zero)
        self.sgd = sgd

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        with torch.no_grad():
            centred = (w - w.mean(1, keepdim=True)).clamp(-1, 1)
            alpha = centred.abs().mean(_per_filter(w))
        surrogate = _XnorGradient.apply(w, centred, alpha, self.sgd)
        return self._single(surrogate, centred, alpha)


class TensorScaledWeight(_WeightBinarizer):
    """DoReFa-Net: w_hat = E sign(w / E), E = mean |w| over the whole tensor, detached; backward g."""

    stored_scales = "tensor"

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        return self._single(w, w, w.detach().abs().mean().expand(w.shape[0]))


class LibraWeight(Scheduled, _WeightBinarizer):
    """IR-Net's Libra-PB: w~ = (w - mean) / std per filter, w_hat = s sign(w~), s = 2^round(log2 mean |w~|) detached.

    The gradient flows through the error decay estimator and through mean and (unbiased) standard deviation. A filter
    of equal weights has std 0: its w~ is 0 and its scale 0.

    Args:
        sign_zero: What sign(0) is.
        t_min: The estimator's t at progress 0.
        t_max: The estimator's t at progress 1.
    """

    def __init__(self, sign_zero: SignZero = "plus", t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__(sign_zero)
        self.t_min, self.t_max = t_min, t_max

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        dims = _per_filter(w)
        centred = w - w.mean(dims, keepdim=True)
        n = w[0].numel()
        variance = centred.square().sum(dims, keepdim=True) / max(n - 1, 1)
        flat = variance == 0
        balanced = centred / torch.where(flat, 1.0, variance).sqrt()
        with torch.no_grad():
            size = balanced.abs().mean(dims)
            scale = torch.where(size == 0, 0.0, torch.exp2(torch.log2(size).round()))
        t, k = ede_schedule(self.progress.to(w.dtype), self.t_min, self.t_max)
        surrogate = _column(scale, w) * ede_sign(balanced, t, k, self.sign_zero)
        return self._single(surrogate, balanced, scale)


class RectifiedWeight(Scheduled, _WeightBinarizer):
    """ReCU: standardised weights w1, clamped to +-Q, then sign; gradient 1{|w1| <= Q}, through the standardisation.

    w1 = (w - mean_o) / (sqrt(var_o + 1e-5) / (2 sqrt 2)) per filter, Q = -mean |w1| ln(2 - 2 tau) detached, tau going
    from ``tau_min`` to ``tau_max`` over training (Xu et al. 2021).
    """

    stored_scales = "none"

    def __init__(self, sign_zero: SignZero = "plus", tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__(sign_zero)
        self.tau_min, self.tau_max = tau_min, tau_max

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        dims = _per_filter(w)
        centred = w - w.mean(dims, keepdim=True)
        variance = centred.square().sum(dims, keepdim=True) / max(w[0].numel() - 1, 1)
        standard = centred / (torch.sqrt(variance + 1e-5) / (2 * math.sqrt(2)))
        tau = self.tau_min + (self.tau_max - self.tau_min) * self.progress.to(w.dtype)
        bound = -standard.detach().abs().mean() * torch.log(2 - 2 * tau)
        inside = (standard.detach().abs() <= bound).to(w.dtype)
        return self._single(standard * inside, standard, w.new_ones(w.shape[0]))


class TwoBasisWeight(_WeightBinarizer):
    """BinaryDM's two bases: w_hat = s1 sign(w) + s2 sign(w - s1 sign(w)), learnable s1 and s2 per filter.

    Both signs have STE-clip's gradient; the residual is taken with s1 sign(w) detached, so that s1 learns from its own
    term alone. Scales start at the least-squares values: mean |w|, then the mean magnitude of the residual.

    Args:
        weight: The latent weights, from which the scales are initialised.
        sign_zero: What sign(0) is.
    """

    terms = 2
    stored_scales = "none"  # they are parameters

    def __init__(self, weight: Tensor, sign_zero: SignZero = "plus") -> None:
        super().__init__(sign_zero)
        with torch.no_grad():
            first = weight.abs().mean(_per_filter(weight))
            residual = weight - _column(first, weight) * hard_sign(weight, sign_zero)
            second = residual.abs().mean(_per_filter(weight))
        self.scale = nn.Parameter(torch.stack([first, second]))

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        first = clipped_sign(w, self.sign_zero)
        residual = w - (_column(self.scale[0], w) * first).detach()
        second = clipped_sign(residual, self.sign_zero)
        surrogate = _column(self.scale[0], w) * first + _column(self.scale[1], w) * second
        return BinaryWeight(surrogate, torch.stack([first, second]).detach(), self.scale.detach())


@register_part("weight", "sign")
def _sign(spec: LayerSpec, clip: bool = True) -> nn.Module:
    return SignWeight(spec.sign_zero, clip)


@register_part("weight", "scaled_sign")
def _scaled_sign(spec: LayerSpec) -> nn.Module:
    return ScaledSignWeight(spec.sign_zero)


@register_part("weight", "two_stage")
def _two_stage(spec: LayerSpec, switch: float = 0.5) -> nn.Module:
    return TwoStageWeight(spec.sign_zero, switch)


@register_part("weight", "xnor")
def _xnor(spec: LayerSpec, sgd: bool = False) -> nn.Module:
    return XnorWeight(spec.sign_zero, sgd)


@register_part("weight", "tensor_scaled")
def _tensor_scaled(spec: LayerSpec) -> nn.Module:
    return TensorScaledWeight(spec.sign_zero)


@register_part("weight", "libra")
def _libra(spec: LayerSpec, t_min: float = 0.1, t_max: float = 10.0) -> nn.Module:
    return LibraWeight(spec.sign_zero, t_min, t_max)


@register_part("weight", "recu")
def _recu(spec: LayerSpec, tau_min: float = 0.85, tau_max: float = 0.99) -> nn.Module:
    return RectifiedWeight(spec.sign_zero, tau_min, tau_max)


@register_part("weight", "two_basis")
def _two_basis(spec: LayerSpec) -> nn.Module:
    return TwoBasisWeight(spec.weight.detach(), spec.sign_zero)
