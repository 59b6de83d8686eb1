"""BBCU: Xia et al. 2023, "Basic Binary Convolution Unit for Binarized Image Restoration Network" (ICLR)."""

from dataclasses import dataclass

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part


@register_method("bbcu")
@dataclass(frozen=True, kw_only=True)
class BBCU(Method):
    """RSign -> scaled sign convolution -> RPReLU -> + shortcut: no BatchNorm, the activation inside the residual.

    The pooled shortcut of a layer that widens repeats the input's channels. Before a PixelShuffle this is the published
    upsampling unit: the shortcut of a C -> 4 C convolution upsamples its input by nearest neighbor. Residual alignment
    and the bilinear shortcut around the whole network belong to that paper's own network.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    post: Part = "rprelu"
    shortcut: Part | bool = True
