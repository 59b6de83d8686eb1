"""BiDM: Zheng et al. 2024, "BiDM: Pushing the Limit of Quantization for Diffusion Models"; its convolution."""

from dataclasses import dataclass

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("bidm")
@dataclass(frozen=True, kw_only=True)
class BiDM(Method):
    """RSign -> scaled sign convolution -> times a learnable k x k map of mean_c |x| -> + factor * shortcut.

    As in the released code, x of the map is the layer's input before the shift, the map's kernel starts as a box
    filter, and the shortcut's learnable factor starts at 0. The released map has a bias with a random initial value,
    which is left out here. If the width changes, the released shortcut is a full-precision 1x1 convolution
    (``shortcut="projection"``); here it is a pooling without parameters. A linear layer, for which the paper gives no
    map, is treated as a 1x1 convolution. The paper's cross-step feature cache belongs to its sampler.

    Attributes:
        shortcut_start: Initial value of the shortcut's factor.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    scale: Part = option("k_map", {"scale.k_map": {"of_input": True}})
    shortcut: Part | bool = "scaled"
    shortcut_start: float = option(0.0, lambda method: {"shortcut.scaled": {"start": method.shortcut_start}})
