"""BiMaCoSR: Liu et al. 2025, "BiMaCoSR: Binary One-Step Diffusion Model Leveraging Flexible Matrix Compression..."."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import LayerSpec, Part, build_part, register_part


@register_part("post", "conv_rprelu")
def _conv_rprelu(spec: LayerSpec) -> nn.Module:
    part = None if spec.kind == "linear" else build_part("post", "rprelu", spec)
    return nn.Identity() if part is None else part


@register_method("bimacosr")
@dataclass(frozen=True, kw_only=True)
class BiMaCoSR(Method):
    """A binary layer with a low-rank and a sparse full-precision branch beside it, which start from its weights.

    Scaled signs with ApproxSign, times the mean magnitude of the input, detached; the layer's bias; an RPReLU after
    convolutions; then the branches (`binarize.layers.LowRankSparse`). All this is as in the released code, except that
    the code multiplies the signs of each pixel by its magnitude inside the convolution, which leaves 1 bit. Here
    XNOR-Net's map, averaged over the taps, multiplies the product: the same for 1x1 convolutions and linear layers. The
    paper's network takes one step, distilled from SinSR; that is a matter of training.

    Attributes:
        rank: Rank of the low-rank branch.
        density: Entries of the sparse branch for each of the layer's channels (input or output, the more).
    """

    activation: Part = "approx_sign"
    scale: Part = option("k_map", {"scale.k_map": {"learned": False}})
    post: Part = "conv_rprelu"
    branch: Part = "low_rank_sparse"
    keep_bias: bool = True
    rank: int = option(8, lambda method: _branch(method))
    density: float = 2.0


def _branch(method: Any) -> dict[str, Any]:
    return {"branch.low_rank_sparse": {"rank": method.rank, "density": method.density}}
