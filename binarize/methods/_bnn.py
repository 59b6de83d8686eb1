"""BNN: Hubara et al. 2016, "Binarized Neural Networks"; BiBench's form: Qin et al. 2023."""

from dataclasses import dataclass
from typing import Any, Literal

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


def _original(method: Method) -> dict[str, Any]:
    clamps = method.clamps_latent is not False
    return {"activation.ste": "identity_ste", "weight.sign": {"clip": False}, "clamps_latent": clamps}


@register_method("bnn")
@dataclass(frozen=True, kw_only=True)
class BNN(Method):
    """sign(w) and sign(x) without a scale: convolution -> BatchNorm -> Hardtanh, no shortcut, no bias.

    Attributes:
        variant: "bibench" clips both straight-through estimators at |x| <= 1, as the benchmark does that published
            comparisons follow, and is therefore the default. "original" passes gradients through unchanged and clamps
            the latent weights to [-1, 1] after each step; Hardtanh clips the activations.
    """

    activation: Part = "ste"
    weight: Part = "sign"
    norm: Part = "batch_norm"
    post: Part = "hardtanh"
    variant: Literal["bibench", "original"] = option("bibench", _original, when="original")
