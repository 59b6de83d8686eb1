"""ReCU: Xu et al. 2021, "ReCU: Reviving the Dead Weights in Binary Neural Networks"."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.errors import BinarizeError
from binarize.layers.parts import Part, PartKind
from binarize.methods._base import Method, register_method


@register_method("recu")
@dataclass(frozen=True, kw_only=True)
class ReCU(Method):
    """Rectified clamp of standardised weights, a learnable output scale per channel, normalised ApproxSign activations.

    Convolution -> scale -> BatchNorm -> + shortcut -> Hardtanh. The clamp tightens with training progress:
    call `binarize.training_step` after each optimizer step.

    Attributes:
        tau_min: tau at the start.
        tau_max: tau at the end.
    """

    activation: Part = "recu"
    weight: Part = "recu"
    scale: Part = "channel"
    norm: Part = "batch_norm"
    post: Part = "hardtanh"
    shortcut: Part | bool = True
    post_after_shortcut: bool = True
    tau_min: float = 0.85
    tau_max: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 < self.tau_min <= self.tau_max < 1:
            raise BinarizeError(f"{self.name}: needs 0.5 < tau_min <= tau_max < 1; got {self.tau_min}, {self.tau_max}.")

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, with the range of tau."""
        if kind == "weight" and self.weight == "recu":
            return {"name": "recu", "tau_min": self.tau_min, "tau_max": self.tau_max}
        return super().part(kind)
