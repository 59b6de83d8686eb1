"""DoReFa-Net with 1-bit weights and activations: Zhou et al. 2016."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("dorefa")
@dataclass(frozen=True, kw_only=True)
class DoReFa(Method):
    """E sign(w / E), E = mean |w| of the tensor, and activations round(clip(x, 0, 1)) in {0, 1}; then BatchNorm.

    Attributes:
        variant: "original" is the authors' released code (the default, being the definition); "bibench" uses +-1
            activations with STE-clip and a detached scale per output channel.
    """

    activation: Part = "unit_round"
    weight: Part = "tensor_scaled"
    norm: Part = "batch_norm"
    variant: Literal["original", "bibench"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("variant", "original", "bibench")

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, in the chosen variant."""
        if self.variant == "bibench":
            if kind == "activation" and self.activation == "unit_round":
                return "ste"
            if kind == "weight" and self.weight == "tensor_scaled":
                return "scaled_sign"
        return super().part(kind)
