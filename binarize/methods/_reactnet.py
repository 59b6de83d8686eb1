"""ReActNet: Liu et al. 2020, "Towards Precise Binary Neural Network with Generalized Activation Functions"."""

from __future__ import annotations

from dataclasses import dataclass

from binarize.errors import BinarizeError
from binarize.layers.method import Method, register_method
from binarize.layers.parts import Part, PartKind


@register_method("reactnet")
@dataclass(frozen=True, kw_only=True)
class ReActNet(Method):
    """RSign -> scaled sign convolution -> BatchNorm -> + shortcut -> RPReLU, no bias.

    A stride-2 shortcut is a 2 x 2 average pool. The published training has two stages, full-precision weights first.

    Attributes:
        two_stage: The share of training, in (0, 1), with full-precision weights and binary activations; None trains
            both binary from the start, which is the default because it needs no schedule.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    norm: Part = "batch_norm"
    post: Part = "rprelu"
    shortcut: Part | bool = True
    post_after_shortcut: bool = True
    two_stage: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage is not None and not 0 < self.two_stage < 1:
            raise BinarizeError(
                f"{self.name}: two_stage is a share of training in (0, 1), or None; got {self.two_stage}."
            )

    def part(self, kind: PartKind) -> Part:
        """Return the part that serves one stage; the weight follows the two stages where asked for."""
        if kind == "weight" and self.weight == "scaled_sign" and self.two_stage is not None:
            return {"name": "two_stage", "switch": self.two_stage}
        return super().part(kind)
