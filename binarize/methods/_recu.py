"""ReCU: Xu et al. 2021, "ReCU: Reviving the Dead Weights in Binary Neural Networks"."""

from dataclasses import dataclass

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part
from binarize.layers.schedule import check_tau_range


@register_method("recu")
@dataclass(frozen=True, kw_only=True)
class ReCU(Method):
    """Rectified clamp of standardized weights, a learnable output scale per channel, normalized ApproxSign activations.

    Convolution -> scale -> BatchNorm -> + shortcut -> Hardtanh. The clamp loosens with training progress:
    call `binarize.training_step` after each optimizer step. The output scale starts at 1; the released code draws it
    from [0, 1), which the BatchNorm behind it undoes.

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
    tau_min: float = option(0.85, lambda method: {"weight.recu": {"tau_min": method.tau_min}})
    tau_max: float = option(0.99, lambda method: {"weight.recu": {"tau_max": method.tau_max}})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tau_range(self.name, self.tau_min, self.tau_max)
