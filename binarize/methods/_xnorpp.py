"""XNOR-Net++: Bulat and Tzimiropoulos 2019, "XNOR-Net++: Improved Binary Neural Networks"."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.parts import Part, PartKind
from binarize.methods._base import Method, register_method


@register_method("xnor++")
@dataclass(frozen=True, kw_only=True)
class XNORPlusPlus(Method):
    """Signs with STE-clip on both sides; the output times learnable o[C] h[H] w[W], starting at 1; then BatchNorm.

    Attributes:
        size: (H, W) of the output, where every converted layer has the same; None, the default, learns the channel
            factor alone, since a U-Net's layers differ in size and serve pictures of any size.
    """

    activation: Part = "ste"
    weight: Part = "sign"
    scale: Part = "channel"
    norm: Part = "batch_norm"
    size: tuple[int, int] | None = None

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, sized where asked for."""
        if kind == "scale" and self.scale == "channel" and self.size is not None:
            return {"name": "channel", "height": self.size[0], "width": self.size[1]}
        return super().part(kind)
