"""BBCU: Xia et al. 2023, "Basic Binary Convolution Unit for Binarized Image Restoration Network" (ICLR)."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.parts import Part
from binarize.methods._base import Method, register_method


@register_method("bbcu")
@dataclass(frozen=True, kw_only=True)
class BBCU(Method):
    """RSign -> scaled sign convolution -> RPReLU -> + shortcut: no BatchNorm, the activation inside the residual.

    Where a layer widens, the pooled shortcut repeats the input's channels, as BBCU's head does. Residual alignment and
    the bilinear shortcut around the whole network belong to that paper's own network, not to the unit.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    post: Part = "rprelu"
    shortcut: Part | bool = True
