"""What binary and packed layers share: their parts, and the stages that follow the product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from binarize.kernels.binary_conv import Geometry
from binarize.layers.parts import LayerKind, per_channel

if TYPE_CHECKING:
    from binarize.layers.method import Method

Stage = Literal["bias", "scale", "norm", "post", "shortcut", "branch"]


class Depth(NamedTuple):
    """How a 3-D convolution moves along the depth; height and width have a `Geometry`."""

    kernel: int
    stride: int
    pad: tuple[int, int]  # (front, back)
    dilation: int

    def output(self, depth: int) -> int:
        """Return the depth of the output."""
        return (depth + sum(self.pad) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    def keeps_size(self) -> bool:
        """Return whether the output has the depth of the input, whatever it is."""
        return self.stride == 1 and sum(self.pad) == self.dilation * (self.kernel - 1)


class PartPipeline(nn.Module):
    """``pre -> activation -> product with binary weights -> bias -> scale -> norm -> post``, with a shortcut around it.

    The shortcut is added after ``post`` (BI-DiffSR, BBCU), or before it with ``post_after_shortcut`` (ReActNet,
    IR-Net). A branch beside the product is added last.
    """

    kind: LayerKind
    pre: nn.Module | None
    activation: nn.Module
    scale: nn.Module | None
    norm: nn.Module | None
    post: nn.Module | None
    shortcut: nn.Module | None
    branch: nn.Module | None
    bias: nn.Parameter | None
    method: Method
    had_bias: bool
    post_after_shortcut: bool
    geometry: Geometry  # of the convolution; a linear layer is a 1x1 convolution
    kernel: tuple[int, int]  # (kh, kw)
    depth: Depth | None = None  # of a 3-D convolution
    widths: tuple[int, int]  # channels of the input and of the output
    bases: int  # how many scaled binary weights are added up
    padding_mode: str = "zeros"  # as in nn.Conv2d
    pad_codes: tuple[int, ...] | None = (
        None  # added to the activation's values before the convolution, as F.pad takes it
    )
    steps: tuple[Any, ...] = ()  # stride, padding, dilation and groups of the convolution after that; () if linear

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages after the product that this layer has, in order."""
        order: tuple[Stage, ...] = ("bias", "scale", "norm", "post", "shortcut", "branch")
        if self.post_after_shortcut:
            order = ("bias", "scale", "norm", "shortcut", "post", "branch")
        return tuple(stage for stage in order if getattr(self, stage) is not None)

    def keeps_shape(self) -> bool:
        """Return whether the output has the shape of the input, and the input is not padded before the kernel."""
        same_size = self.widths[0] == self.widths[1] and (self.depth is None or self.depth.keeps_size())
        return same_size and self.padding_mode == "zeros" and self.geometry.keeps_size(self.kernel)

    def shifted(self, x: Tensor) -> Tensor:
        """Return what the activation binarizes."""
        out: Tensor = x if self.pre is None else self.pre(x)
        return out

    def has_many_values(self) -> bool:
        """Return whether the activation declares more than two values, so that nothing is gained by scaling last."""
        bits = getattr(self.activation, "bits", None)
        return bits is not None and bits > 1

    def padded(self, x: Tensor) -> Tensor:
        """Return the activation's values with the padding that the convolution does not add itself."""
        if self.pad_codes is None:
            return x
        return F.pad(x, self.pad_codes, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def clamp_latent_(self) -> None:
        """Clamp the latent weights after an optimizer step, if the layer does so; see `binarize.training_step`."""

    def run_stages(self, stages: Iterable[Stage], y: Tensor, x: Tensor, shifted: Tensor | None = None) -> Tensor:
        """Apply stages as modules, in order, to the product ``y`` of a layer with input ``x``.

        ``shifted`` is what went into the activation; None computes it if a stage reads it.
        """
        for stage in stages:
            part = getattr(self, stage)
            if stage == "bias":
                y = y + (part if self.kind == "linear" else per_channel(part, y)).to(y.dtype)
            elif stage == "scale":
                reads_input = getattr(part, "of_input", False)
                y = part(y, x if reads_input else self.shifted(x) if shifted is None else shifted)
            else:
                y = part(y, x) if stage in ("shortcut", "branch") else part(y)
        return y
