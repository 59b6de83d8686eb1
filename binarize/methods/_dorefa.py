"""DoReFa-Net with 1-bit weights and activations: Zhou et al. 2016."""

from dataclasses import dataclass
from typing import Literal

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("dorefa")
@dataclass(frozen=True, kw_only=True)
class DoReFa(Method):
    """E sign(w / E), E = mean |w| of the tensor, and activations round(clip(x, 0, 1)) in {0, 1}; then BatchNorm.

    Attributes:
        variant: "original" is the authors' released code, and the default. "bibench" uses +-1 activations with STE-clip
            and a detached scale per output channel.
    """

    activation: Part = "unit_round"
    weight: Part = "tensor_scaled"
    norm: Part = "batch_norm"
    variant: Literal["original", "bibench"] = option(
        "original", {"activation.unit_round": "ste", "weight.tensor_scaled": "scaled_sign"}, when="bibench"
    )
