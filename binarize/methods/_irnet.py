"""IR-Net: Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural Networks"."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind
from binarize.layers.schedule import check_ede_range


@register_method("irnet")
@dataclass(frozen=True, kw_only=True)
class IRNet(Method):
    """Balanced, standardised weights with a power-of-two scale; error decay estimator on weights and activations.

    Convolution -> BatchNorm -> + shortcut -> Hardtanh. The estimator sharpens with training progress:
    call `binarize.training_step` after each optimizer step.

    Attributes:
        t_min: The estimator's t at the start (0.1 in the paper; one of the authors' trainers has 1e-3).
        t_max: The estimator's t at the end.
    """

    activation: Part = "ede"
    weight: Part = "libra"
    norm: Part = "batch_norm"
    post: Part = "hardtanh"
    shortcut: Part | bool = True
    post_after_shortcut: bool = True
    t_min: float = 0.1
    t_max: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ede_range(self.name, self.t_min, self.t_max)

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage, with the estimator's range."""
        if (kind == "activation" and self.activation == "ede") or (kind == "weight" and self.weight == "libra"):
            return {"name": getattr(self, kind), "t_min": self.t_min, "t_max": self.t_max}
        return super().part(kind)
