"""Weight binarizers: modules that turn latent weights into +-1 codes, scales and a surrogate gradient.

``forward(w)`` returns a `BinaryWeight`. ``w`` is ``(C_out, C_in / groups, kh, kw)`` or ``(C_out, C_in)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from binarize.errors import BinarizeError
from binarize.kernels.capture import is_transformed
from binarize.kernels.product import BinaryWeight
from binarize.kernels.signs import SignZero, clipped_identity, clipped_sign, ede_sign, hard_sign, straight_through
from binarize.layers.parts import LayerSpec, StoredScales, WeightBinarizer, register_part, with_sign_zero
from binarize.layers.schedule import Scheduled, check_ede_range, check_tau_range, ede_schedule, recu_schedule

_MOST_BASES = 16  # of fixed weights; a file could ask for any number


def _per_filter(w: Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.dim()))


def _column(values: Tensor, w: Tensor) -> Tensor:
    return values.view(-1, *[1] * (w.dim() - 1))


class _WeightBinarizer(WeightBinarizer):
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
    """w_hat = sign(w), no scale (BNN); backward g * 1{|w| <= 1} with ``clip`` (BiBench's form), else g."""

    stored_scales = "none"
    is_plain_sign = True

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

    is_plain_sign = True

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        return self._single(clipped_identity(w), w, self.weight_scale(w))

    def weight_scale(self, w: Tensor) -> Tensor:
        """Return the scales ``(C_out,)``."""
        # One pass without a copy, unlike abs().mean().
        return torch.linalg.vector_norm(w.detach(), 1, _per_filter(w)) / w[0].numel()


class _XnorGradient(torch.autograd.Function):
    """The identity with XNOR-Net's gradient, which no composition of operators has."""

    @staticmethod
    def forward(w: Tensor, sgd: bool) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        w, ctx.sgd = inputs
        ctx.save_for_backward(w)
        ctx.save_for_forward(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _xnor_slope(ctx.saved_tensors[0], ctx.sgd), None


class _TransformedXnorGradient(_XnorGradient):
    """The same with rules for torch.func and forward mode, which compilers cannot read."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * _xnor_slope(ctx.saved_tensors[0], ctx.sgd)


def _xnor_centred(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred and clamped weights, and the scale of each filter."""
    centred = (w - w.mean(1, keepdim=True) if w.shape[1] > 1 else w).clamp(-1, 1)
    return centred, centred.abs().mean(_per_filter(w))


def _xnor_slope(w: Tensor, sgd: bool) -> Tensor:
    centred, alpha = _xnor_centred(w)
    n, channels = w[0].numel(), w.shape[1]
    factor = _column(alpha, w) * (centred.abs() < 1) + 1 / n
    if channels > 1:
        factor = factor * (1 - 1 / channels)
    return factor * n if sgd else factor


class XnorWeight(_WeightBinarizer):
    """XNOR-Net: centre over the input channels, clamp to [-1, 1], w_hat = ||w||_1 / n * sign(w).

    The backward is that of the authors' released code, g * (alpha 1{|w| < 1} + 1/n) (1 - 1/C_in) on the centred
    weights, where n is the size of a filter; ``sgd`` multiplies it by n, as the authors do with SGD. Their code writes
    the centred and clamped weights back into the latents at each step. Here the latents are not written, which is
    equivalent while all stay in [-1, 1]. Filters over a single channel (depthwise convolutions) are neither centred nor
    is their gradient reduced by 1 - 1/C_in, since both would become zero.
    """

    def __init__(self, sign_zero: SignZero = "plus", sgd: bool = False) -> None:
        super().__init__(sign_zero)
        self.sgd = sgd

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        centred, alpha = _xnor_centred(w.detach())
        if torch.jit.is_tracing():  # which cannot save the function
            surrogate = straight_through(w, w * _xnor_slope(w.detach(), self.sgd))
        else:
            surrogate = (_TransformedXnorGradient if is_transformed() else _XnorGradient).apply(w, self.sgd)
        return self._single(surrogate, centred, alpha)


class TensorScaledWeight(_WeightBinarizer):
    """DoReFa-Net: w_hat = E sign(w / E), E = mean |w| over the whole tensor, detached; backward g."""

    stored_scales = "tensor"

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        return self._single(w, w, w.detach().abs().mean().expand(w.shape[0]))


class LibraWeight(Scheduled, _WeightBinarizer):
    """IR-Net's Libra-PB: w~ = (w - mean) / std per filter, w_hat = s sign(w~), s = 2^round(log2 mean |w~|) detached.

    The gradient flows through the error decay estimator, whose t goes from ``t_min`` to ``t_max`` over training, and
    through mean and (unbiased) standard deviation. A filter of equal weights, such as a zero-initialised one, has std
    0: its w~ and scale are 0, so it adds nothing to the output. Its gradient is computed with std = s = 1, so that it
    can be trained away from that state.
    """

    def __init__(self, sign_zero: SignZero = "plus", t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__(sign_zero)
        check_ede_range(type(self).__name__, t_min, t_max)
        self.t_min, self.t_max = t_min, t_max

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        dims = _per_filter(w)
        centred = w - w.mean(dims, keepdim=True)
        n = w[0].numel()
        variance = centred.square().sum(dims, keepdim=True) / max(n - 1, 1)
        flat = w.amax(dims, keepdim=True) == w.amin(dims, keepdim=True)
        balanced = centred / torch.where(flat, 1.0, variance).sqrt()
        with torch.no_grad():
            power = torch.exp2(torch.log2(balanced.abs().mean(dims)).round())
            learning = torch.where(flat.flatten(), 1.0, power)
            scale = torch.where(flat.flatten(), 0.0, power)
            signed = torch.where(flat, 0.0, balanced)
        t, k = ede_schedule(self.progress, self.t_min, self.t_max)
        surrogate = _column(learning, w) * ede_sign(balanced, t, k, self.sign_zero)
        return self._single(surrogate, signed, scale)


class RectifiedWeight(Scheduled, _WeightBinarizer):
    """ReCU: standardised weights w1, clamped to +-Q, then sign; gradient 1{|w1| <= Q}, through the standardisation.

    w1 = (w - mean_o) / (sqrt(var_o + 1e-5) / (2 sqrt 2)) per filter (unbiased variance), Q = -mean |w1| ln(2 - 2 tau)
    detached, the mean over the whole tensor. tau goes from ``tau_min`` to ``tau_max`` over training along the released
    code's exponential, tau_min + (tau_max - tau_min) (e^progress - 1) / (e - 1) (Xu et al. 2021).
    """

    stored_scales = "none"

    def __init__(self, sign_zero: SignZero = "plus", tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__(sign_zero)
        check_tau_range(type(self).__name__, tau_min, tau_max)
        self.tau_min, self.tau_max = tau_min, tau_max

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        dims = _per_filter(w)
        centred = w - w.mean(dims, keepdim=True)
        variance = centred.square().sum(dims, keepdim=True) / max(w[0].numel() - 1, 1)
        standard = centred / (torch.sqrt(variance + 1e-5) / (2 * math.sqrt(2)))
        tau = recu_schedule(self.progress, self.tau_min, self.tau_max)
        bound = -standard.detach().abs().mean() * torch.log(2 - 2 * tau)
        inside = (standard.detach().abs() <= bound).to(w.dtype)
        return self._single(standard * inside, standard, w.new_ones(w.shape[0]))


class TwoBasisWeight(_WeightBinarizer):
    """BinaryDM's two bases: w_hat = s1 sign(w) + s2 sign(w - s1 sign(w)), learnable s1 and s2 per filter.

    Both signs have STE-clip's gradient. The second one's flows through the residual r = w - s1 sign(w) into w and s1,
    as in the released code. With m1 = 1{|w| <= 1} and m2 = 1{|r| <= 1},

        dL/dw = g (s1 m1 + s2 m2 (1 - s1 m1)),  dL/ds1 = sum g sign(w) (1 - s2 m2),  dL/ds2 = sum g sign(r).

    Scales start at the least-squares values for the latent ``weight``: mean |w|, then the mean magnitude of the
    residual.
    """

    bases = 2

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
        base = _column(self.scale[0], w) * first
        second = clipped_sign(w - base, self.sign_zero)
        surrogate = base + _column(self.scale[1], w) * second
        return BinaryWeight(surrogate, torch.stack([first, second]).detach(), self.scale.detach())


class FixedWeight(_WeightBinarizer):
    """w_hat = s_1 sign(w) + sum_k>1 s_k c_k with fixed scales s and codes c: the weights of an unpacked model.

    The gradient of w is g * 1{|w| <= 1}, so the signs can still be trained. With ``learned`` scales it is
    s_1 g * 1{|w| <= 1}, and the gradient of s_k is sum g c_k, as for two-basis weights.

    A new layer starts from least-squares values for its latent ``weight``: s_k is the mean magnitude and c_k the sign
    of the residual of w after the bases before it. ``terms`` is the number of scaled signs.
    """

    scales: Tensor
    codes: Tensor | None

    def __init__(
        self, weight: Tensor, terms: int = 1, stored_scales: StoredScales = "filter", learned: bool = False
    ) -> None:
        super().__init__("plus")
        if not 1 <= terms <= _MOST_BASES or stored_scales not in ("filter", "tensor", "none"):
            raise BinarizeError(
                f"fixed weights have 1 to {_MOST_BASES} terms and stored_scales 'filter', 'tensor' or 'none'; "
                f"got {terms} and {stored_scales!r}."
            )
        self.bases, self.stored_scales, self.learned = terms, stored_scales, learned
        self.is_plain_sign = terms == 1 and not learned
        scales, codes, rest = [], [], weight.detach()
        for _ in range(terms):
            codes.append(hard_sign(rest, "plus"))
            mean = rest.abs().mean(_per_filter(rest) if stored_scales == "filter" else None)
            scales.append(weight.new_ones(weight.shape[0]) * (1 if stored_scales == "none" else mean))
            rest = rest - _column(scales[-1], rest) * codes[-1]
        if learned:
            self.scales = nn.Parameter(torch.stack(scales))
        else:
            self.register_buffer("scales", torch.stack(scales))
        self.register_buffer("codes", torch.stack(codes[1:]).to(torch.int8) if terms > 1 else None)

    def forward(self, w: Tensor) -> BinaryWeight:
        """Binarize latent weights."""
        held, codes = self.scales.detach(), hard_sign(w.detach(), "plus").unsqueeze(0)
        if self.codes is not None:
            codes = torch.cat([codes, self.codes.to(w.dtype)])
        if not self.learned:
            return BinaryWeight(clipped_identity(w), codes, held)
        surrogate = _column(self.scales[0], w) * clipped_sign(w, "plus")
        for scale, code in zip(self.scales[1:], codes[1:], strict=True):
            surrogate = surrogate + _column(scale, w) * code
        return BinaryWeight(surrogate, codes, held)

    def weight_scale(self, w: Tensor) -> Tensor:
        """Return the scales ``(C_out,)`` of the first basis."""
        return self.scales[0].detach()


for _name, _part in (
    ("sign", SignWeight), ("scaled_sign", ScaledSignWeight), ("xnor", XnorWeight), ("libra", LibraWeight),
    ("tensor_scaled", TensorScaledWeight), ("recu", RectifiedWeight),
):  # fmt: skip
    register_part("weight", _name)(with_sign_zero(_part))
register_part("weight", "two_basis")(lambda spec: TwoBasisWeight(spec.weight.detach(), spec.sign_zero))


@register_part("weight", "fixed")
def _fixed(spec: LayerSpec, terms: int = 1, stored_scales: StoredScales = "filter", learned: bool = False) -> nn.Module:
    return FixedWeight(spec.weight.detach(), terms, stored_scales, learned)
