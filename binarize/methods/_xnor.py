"""XNOR-Net: Rastegari et al. 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks"."""

from dataclasses import dataclass
from typing import Any, Literal

from binarize.errors import BinarizeError
from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


def _bibench(method: Method) -> dict[str, Any]:
    scaled = {} if method.scale is not None else {"scale": "input_mean", "activation.ste": "mean_ste"}
    return {"weight.xnor": "scaled_sign", **scaled}


@register_method("xnor")
@dataclass(frozen=True, kw_only=True)
class XNOR(Method):
    """Centered, clamped weights with a scale per filter, and STE-clip activations.

    The K map of the paper's text is in neither released implementation; ``scale="k_map"`` adds it, learnable, as BiDM
    does.

    Attributes:
        variant: "authors", the default, has the released code's weight binarizer and gradient. "bibench" uses plain
            scaled signs and multiplies each sample (each token of a linear layer) by its mean magnitude, through which
            no gradient flows.
        norm_position: Position of the BatchNorm: "after" the convolution, the default, which fits the published
            parameter counts of BI-DiffSR's Table 2, or "before" the sign, as in XNOR-Net's blocks.
        sgd: Multiply the weight gradient by n, as the authors do with SGD.
    """

    activation: Part = "ste"
    weight: Part = "xnor"
    norm: Part = "batch_norm"
    variant: Literal["authors", "bibench"] = option("authors", _bibench, when="bibench")
    norm_position: Literal["after", "before"] = option(
        "after", lambda method: {"pre": method.pre or method.norm, "norm": None}, when="before"
    )
    sgd: bool = option(False, lambda method: {"weight.xnor": {"sgd": method.sgd}})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_position == "before" and self.pre is not None and self.norm is not None:
            raise BinarizeError(
                f"{self.name}: norm_position='before' puts the norm where pre={self.pre!r} stands; "
                "set norm=None or pre=None."
            )
