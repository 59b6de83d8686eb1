"""BinaryDM: Zheng et al. 2024, "BinaryDM: Towards Accurate Binarization of Diffusion Model"; its two-basis weights."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("binarydm")
@dataclass(frozen=True, kw_only=True)
class BinaryDM(Method):
    """w_hat = s1 sign(w) + s2 sign(w - s1 sign(w)) with learnable scales per filter, and STE-clip sign activations.

    That paper keeps activations at 4 bits or more; here they are 1-bit, so that the method compares with the others.
    Each layer costs two binary convolutions, and counts as two in `binarize.summary`. The scales are initialised when
    the layer is built, never at the first forward, so loading a checkpoint keeps what was trained. The shortcut is
    multiplied by a learnable magnitude, as in the released code; where the width changes that code has a full-precision
    1x1 convolution, here it is a parameter-free pooling (``shortcut="projection"`` for the former).

    Attributes:
        shortcut_start: Where the shortcut's factor starts.
    """

    activation: Part = "ste"
    weight: Part = "two_basis"
    shortcut: Part | bool = "scaled"
    shortcut_start: float = 0.3

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, with this method's options."""
        if kind == "shortcut" and self.shortcut == "scaled":
            return {"name": "scaled", "start": self.shortcut_start, "magnitude": True}
        return super().part(kind)
