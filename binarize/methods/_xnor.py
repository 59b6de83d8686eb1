"""XNOR-Net: Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from binarize.errors import BinarizeError
from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("xnor")
@dataclass(frozen=True, kw_only=True)
class XNOR(Method):
    """Centred, clamped weights with a scale per filter, and STE-clip activations.

    The K map of the paper's text is in neither released implementation; ``scale="k_map"`` adds it, learnable, as BiDM
    does.

    Attributes:
        variant: "authors" is the released code's weight binarizer and gradient (the default, being the definition);
            "bibench" uses plain scaled signs and multiplies each sample (each token of a linear layer) by its mean
            magnitude, which its gradient leaves out.
        norm_position: Where the BatchNorm stands: "after" the convolution (the default, which the published parameter
            counts of BI-DiffSR's Table 2 fit) or "before" the sign, as in XNOR-Net's blocks.
        sgd: Multiply the weight gradient by n, as the authors do with SGD.
    """

    activation: Part = "ste"
    weight: Part = "xnor"
    norm: Part = "batch_norm"
    variant: Literal["authors", "bibench"] = "authors"
    norm_position: Literal["after", "before"] = "after"
    sgd: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("variant", "authors", "bibench")
        self.check_choice("norm_position", "after", "before")
        if self.norm_position == "before" and self.pre is not None and self.norm is not None:
            raise BinarizeError(
                f"{self.name}: norm_position='before' puts the norm where pre={self.pre!r} stands; "
                "set norm=None or pre=None."
            )

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, in the chosen variant."""
        if self.norm_position == "before" and kind in ("pre", "norm"):
            return (self.pre or self.norm) if kind == "pre" else None
        if kind == "weight" and self.weight == "xnor":
            return "scaled_sign" if self.variant == "bibench" else {"name": "xnor", "sgd": self.sgd}
        if self.variant == "bibench" and self.scale is None and kind == "scale":
            return "input_mean"
        if self.variant == "bibench" and self.scale is None and kind == "activation" and self.activation == "ste":
            return "mean_ste"
        return super().part(kind)
