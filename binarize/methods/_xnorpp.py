"""XNOR-Net++: Bulat and Tzimiropoulos 2019, "XNOR-Net++: Improved Binary Neural Networks"."""

from dataclasses import dataclass

from binarize.errors import BinarizeError
from binarize.layers.method import Method, option, register_method
from binarize.layers.parts import Part


@register_method("xnor++")
@dataclass(frozen=True, kw_only=True)
class XNORPlusPlus(Method):
    """Signs with STE-clip on both sides; the output times learnable o[C] h[H] w[W], starting at 1; then BatchNorm.

    Attributes:
        size: (H, W) of the largest output; smaller ones use the leading factors, as in BiBench. None, the default,
            learns the channel factor alone, since a U-Net serves images of any size. Linear layers have no h and w.
    """

    activation: Part = "ste"
    weight: Part = "sign"
    scale: Part = "channel"
    norm: Part = "batch_norm"
    size: tuple[int, int] | None = option(
        None, lambda method: {"scale.channel": dict(zip(("height", "width"), method.size, strict=True))}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = isinstance(self.size, tuple) and len(self.size) == 2
        if self.size is not None and not (pair and all(isinstance(n, int) and n > 0 for n in self.size)):
            raise BinarizeError(f"{self.name}: size must be (H, W) in pixels, or None; got {self.size!r}.")
