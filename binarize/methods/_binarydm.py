"""BinaryDM: Zheng et al. 2024, "BinaryDM: Towards Accurate Binarization of Diffusion Model"; its two-basis weights."""

from dataclasses import dataclass

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("binarydm")
@dataclass(frozen=True, kw_only=True)
class BinaryDM(Method):
    """w_hat = s1 sign(w) + s2 sign(w - s1 sign(w)) with learnable scales per filter, and STE-clip sign activations.

    The paper keeps activations at 4 bits or more: ``activation={"name": "lsq", "bits": 4}`` is its W1A4, 8 bits are its
    W1A8 and ``activation="none"`` is its W1A32. By default they have 1 bit, as in the other methods. Each layer then
    costs two binary convolutions, and counts as two in `binarize.summary`. The scales are initialized when the layer is
    built, not at the first forward, so loading a checkpoint keeps trained values. The shortcut is multiplied by a
    learnable magnitude, as in the released code. If the width changes, the released shortcut is a full-precision 1x1
    convolution (``shortcut="projection"``); here it is a pooling without parameters.

    Attributes:
        shortcut_start: Initial value of the shortcut's factor.
    """

    activation: Part = "ste"
    weight: Part = "two_basis"
    shortcut: Part | bool = "scaled"
    shortcut_start: float = option(
        0.3, lambda method: {"shortcut.scaled": {"start": method.shortcut_start, "magnitude": True}}
    )
