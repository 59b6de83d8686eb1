"""BNN: Hubara et al. 2016, "Binarized Neural Networks"; BiBench's form: Qin et al. 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("bnn")
@dataclass(frozen=True, kw_only=True)
class BNN(Method):
    """sign(w) and sign(x) without a scale: convolution -> BatchNorm -> Hardtanh, no shortcut, no bias.

    Attributes:
        variant: "bibench" clips both straight-through estimators at |x| <= 1, as the benchmark that published
            comparisons follow does (the default for that reason); "original" passes gradients through unchanged and
            clamps the latent weights to [-1, 1] after each step, Hardtanh doing the clipping of activations.
    """

    activation: Part = "ste"
    weight: Part = "sign"
    norm: Part = "batch_norm"
    post: Part = "hardtanh"
    variant: Literal["bibench", "original"] = "bibench"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("variant", "bibench", "original")

    @property
    def clamps(self) -> bool:
        """Whether latent weights are clamped after each optimizer step: in the original variant, unless told."""
        return self.variant == "original" if self.clamps_latent is None else self.clamps_latent

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, in the chosen variant."""
        if self.variant == "original":
            if kind == "activation" and self.activation == "ste":
                return "identity_ste"
            if kind == "weight" and self.weight == "sign":
                return {"name": "sign", "clip": False}
        return super().part(kind)
