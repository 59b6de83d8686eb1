"""Ternary weights {-a, 0, +a}, as the sum of two binary bases with the scale a / 2.

+a is a/2 + a/2, 0 is a/2 - a/2 and -a is -a/2 - a/2, all exact in floating point. So a ternary weight is stored in two
bits, and a product with signs is two binary products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from binarize.kernels.product import BinaryWeight
from binarize.layers.parts import LayerSpec, StoredScales, WeightBinarizer, register_part


class TernaryWeight(WeightBinarizer):
    """Base class of ternary weight binarizers: forward a t with t in {-1, 0, +1}; backward g."""

    bases = 2
    stored_scales: StoredScales = "tensor"

    def ternarize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return t, of the shape of ``w``, and the scales a ``(C_out,)``."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> BinaryWeight:
        """Ternarize latent weights."""
        with torch.no_grad():
            t, scale = self.ternarize(w.detach())
            ones = torch.ones_like(t)
            codes = torch.stack([torch.where(t >= 0, ones, -ones), torch.where(t > 0, ones, -ones)])
            return BinaryWeight(w, codes, (scale / 2).expand(2, -1))


class TWNWeight(TernaryWeight):
    """Ternary Weight Networks: t = sign(w) where |w| > D, else 0; D = 0.7 mean |w|; a = mean |w| where |w| > D.

    Both means are over the whole tensor, as in the authors' released code, or over each filter with ``per_filter``; the
    paper writes them for one filter (Li et al. 2016, eqs. 4 and 6). The gradient of the ternary weights is that of the
    latents.
    """

    def __init__(self, per_filter: bool = False) -> None:
        super().__init__()
        self.per_filter = per_filter
        self.stored_scales = "filter" if per_filter else "tensor"

    def extra_repr(self) -> str:
        """Return the option for the module's repr."""
        return f"per_filter={self.per_filter}"

    def ternarize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return t, of the shape of ``w``, and the scales a ``(C_out,)``."""
        rows = w.flatten(1) if self.per_filter else w.reshape(1, -1)
        magnitude = rows.abs()
        kept = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
        scale = (magnitude * kept).sum(1) / kept.sum(1).clamp_min(1)
        return (rows.sign() * kept).view_as(w), scale.expand(w.shape[0])


class AbsMeanWeight(TernaryWeight):
    """BitNet b1.58: t = clip(round(w / m), -1, 1), a = m = mean |w| over the tensor, at least 1e-5; ties to even.

    Ma et al. 2024, "The Era of 1-bit LLMs", eqs. 1 to 3. Its activations have 8 bits.
    """

    def ternarize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return t, of the shape of ``w``, and the scales a ``(C_out,)``."""
        mean = w.abs().mean().clamp_min(1e-5)
        return (w / mean).round().clamp(-1, 1), mean.expand(w.shape[0])


register_part("weight", "absmean")(lambda spec: AbsMeanWeight())


@register_part("weight", "twn")
def _twn(spec: LayerSpec, per_filter: bool = False) -> nn.Module:
    return TWNWeight(per_filter)
