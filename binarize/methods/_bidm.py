"""BiDM: Zheng et al. 2024, "BiDM: Pushing the Limit of Quantization for Diffusion Models"; its convolution."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.parts import Part
from binarize.methods._base import Method, register_method


@register_method("bidm")
@dataclass(frozen=True, kw_only=True)
class BiDM(Method):
    """Scaled sign weights, sign activations, and the output times a learnable k x k map of mean_c |x|.

    The cross-step feature cache of that paper belongs to its sampler, not to the convolution, and is not part of this.
    """

    activation: Part = "ste"
    scale: Part = "k_map"
    shortcut: Part | bool = True
