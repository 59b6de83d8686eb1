"""BinaryDM: Zheng et al. 2024, "BinaryDM: Towards Accurate Binarization of Diffusion Model"; its two-basis weights."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.parts import Part
from binarize.methods._base import Method, register_method


@register_method("binarydm")
@dataclass(frozen=True, kw_only=True)
class BinaryDM(Method):
    """w_hat = s1 sign(w) + s2 sign(w - s1 sign(w)) with learnable scales per filter, and sign activations.

    That paper keeps activations at 4 bits or more; here they are 1-bit, so that the method compares with the others.
    Each layer costs two binary convolutions, and counts as two in `binarize.summary`. The scales are initialised when
    the layer is built, never at the first forward, so loading a checkpoint keeps what was trained.
    """

    activation: Part = "ste"
    weight: Part = "two_basis"
    shortcut: Part | bool = True
