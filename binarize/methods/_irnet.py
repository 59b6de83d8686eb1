"""IR-Net: Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural Networks"."""

from dataclasses import dataclass

from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part
from binarize.layers.schedule import check_ede_range


@register_method("irnet")
@dataclass(frozen=True, kw_only=True)
class IRNet(Method):
    """Balanced, standardized weights with a power-of-two scale; error decay estimator on weights and activations.

    Convolution -> BatchNorm -> + shortcut -> Hardtanh. The estimator sharpens with training progress:
    call `binarize.training_step` after each optimizer step.

    Attributes:
        t_min: The estimator's t at the start (0.1 in the paper; one of the authors' trainers uses 1e-3).
        t_max: The estimator's t at the end.
    """

    activation: Part = "ede"
    weight: Part = "libra"
    norm: Part = "batch_norm"
    post: Part = "hardtanh"
    shortcut: Part | bool = True
    post_after_shortcut: bool = True
    t_min: float = option(0.1, lambda m: {"activation.ede": {"t_min": m.t_min}, "weight.libra": {"t_min": m.t_min}})
    t_max: float = option(10.0, lambda m: {"activation.ede": {"t_max": m.t_max}, "weight.libra": {"t_max": m.t_max}})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ede_range(self.name, self.t_min, self.t_max)
