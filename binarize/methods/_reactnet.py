"""ReActNet: Liu et al. 2020, "Towards Precise Binary Neural Network with Generalized Activation Functions"."""

from dataclasses import dataclass

from binarize.errors import BinarizeError
from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("reactnet")
@dataclass(frozen=True, kw_only=True)
class ReActNet(Method):
    """RSign -> scaled sign convolution -> BatchNorm -> + shortcut -> RPReLU, no bias.

    A stride-2 shortcut is a 2 x 2 average pool. The published training has two stages, full-precision weights first.

    Attributes:
        two_stage: The share of training, in (0, 1), with full-precision weights and binary activations. None, the
            default, trains with binary weights from the start and needs no schedule.
    """

    activation: Part = "approx_sign"
    pre: Part = "shift"
    norm: Part = "batch_norm"
    post: Part = "rprelu"
    shortcut: Part | bool = True
    post_after_shortcut: bool = True
    two_stage: float | None = option(
        None, lambda method: {"weight.scaled_sign": {"name": "two_stage", "switch": method.two_stage}}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage is not None and not 0 < self.two_stage < 1:
            raise BinarizeError(
                f"{self.name}: two_stage is a share of training in (0, 1), or None; got {self.two_stage}."
            )
