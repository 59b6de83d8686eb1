"""BiDM: Zheng et al. 2024, "BiDM: Pushing the Limit of Quantization for Diffusion Models"; its convolution."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("bidm")
@dataclass(frozen=True, kw_only=True)
class BiDM(Method):
    """RSign -> scaled sign convolution -> times a learnable k x k map of mean_c |x| -> + factor * shortcut.

    As in the released code, x of the map is the layer's input before the shift, the map's kernel starts as a box
    filter, and the learnable factor of the shortcut at 0. That code's map has a bias, drawn at random, left out here;
    where the width changes its shortcut is a full-precision 1x1 convolution, here a parameter-free pooling
    (``shortcut="projection"`` for the former). A linear layer, for which the paper gives no map, is taken as a 1x1
    convolution. The cross-step feature cache of that paper belongs to its sampler and is not part of this.

    Attributes:
        shortcut_start: Where the shortcut's factor starts.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    scale: Part = "k_map"
    shortcut: Part | bool = "scaled"
    shortcut_start: float = 0.0

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, with this method's options."""
        if kind == "scale" and self.scale == "k_map":
            return {"name": "k_map", "of_input": True}
        if kind == "shortcut" and self.shortcut == "scaled":
            return {"name": "scaled", "start": self.shortcut_start}
        return super().part(kind)
