"""Bi-Real Net: Liu et al. 2018, "Bi-Real Net: Enhancing the Performance of 1-bit CNNs"."""

from dataclasses import dataclass

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part


@register_method("bireal")
@dataclass(frozen=True, kw_only=True)
class BiReal(Method):
    """ApproxSign -> scaled sign convolution -> BatchNorm -> + shortcut around every convolution.

    If the shape changes, the shortcut is a full-precision AvgPool -> 1x1 convolution -> BatchNorm, as published;
    ``shortcut=True`` pools without parameters instead, and so does every linear layer. The original initialization
    (rand * 0.001, all positive) relies on a pretrained checkpoint and is not used: latent weights keep nn.Conv2d's.
    """

    activation: Part = "approx_sign"
    norm: Part = "batch_norm"
    shortcut: Part | bool = "projection"
