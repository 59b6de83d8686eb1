"""CP-Down, CP-Up and CS-Fusion with the interfaces of diffusers' U-Net blocks. This module imports diffusers."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from binarize.layers import CPDown, CPUp, CSFusion


class CPDownsample2D(CPDown):
    """CP-Down in place of diffusers' Downsample2D; 2 ``splits`` double the width, 4 keep it.

    Half of an odd size is rounded as in the replaced convolution: up if that padded both sides, else down.
    """

    def __init__(self, channels: int, splits: int, round_up: bool = True) -> None:
        super().__init__(channels, splits)
        self.channels, self.round_up = channels, round_up

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Map ``(B, C, H, W)`` to ``(B, 4 C / splits, H / 2, W / 2)``; Downsample2D's other arguments are ignored."""
        height, width = hidden_states.shape[-2:]
        if height % 2 or width % 2:
            sign = 1 if self.round_up else -1
            hidden_states = F.pad(hidden_states, (0, sign * (width % 2), 0, sign * (height % 2)))
        return super().forward(hidden_states)


class CPUpsample2D(CPUp):
    """CP-Up in place of diffusers' Upsample2D; 2 ``branches`` halve the width, 4 keep it."""

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__(channels, branches)
        self.channels = channels

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, branches C / 4, 2 H, 2 W)``, or to ``output_size`` (nearest)."""
        out = super().forward(hidden_states)
        if output_size is not None and tuple(out.shape[-2:]) != tuple(output_size):
            out = F.interpolate(out, size=tuple(output_size), mode="nearest")
        return out


class FusedResnetBlock2D(ResnetBlock2D):
    """CS-Fusion of the concatenated [hidden, skip], then a ResnetBlock2D of constant width with ``options``."""

    def __init__(self, fusion: CSFusion, **options: Any) -> None:
        super().__init__(**options)
        self.fusion = fusion

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map the concatenation ``(B, h + s, H, W)`` and the time embedding to ``(B, C, H, W)``."""
        out: Tensor = super().forward(self.fusion(input_tensor), temb, *args, **kwargs)
        return out


def constant_width(resnet: ResnetBlock2D, fused: tuple[int, int] | None = None) -> ResnetBlock2D:
    """Return a resnet block from C to C channels, where C is the output width of ``resnet``, which is not changed.

    Submodules that keep their name and shape are the same objects. norm1 and conv1 are new if the width differs, and
    there is no 1x1 shortcut. ``fused`` are the widths (h, s) of hidden and skip for a CS-Fusion in front.
    """
    width, weight = resnet.out_channels, resnet.conv2.weight
    old, last = resnet.norm1, resnet.norm2
    options = {
        "in_channels": width,
        "out_channels": width,
        "temb_channels": None if resnet.time_emb_proj is None else resnet.time_emb_proj.in_features,
        "groups": old.num_groups if width % old.num_groups == 0 else last.num_groups,
        "groups_out": last.num_groups,
        "eps": old.eps,
        "time_embedding_norm": resnet.time_embedding_norm,
        "skip_time_act": resnet.skip_time_act,
        "output_scale_factor": resnet.output_scale_factor,
    }
    with torch.device(weight.device):
        new = ResnetBlock2D(**options) if fused is None else FusedResnetBlock2D(CSFusion(*fused, width), **options)
    new.to(dtype=weight.dtype).train(resnet.training)
    for name, module in resnet.named_children():
        mine = getattr(new, name)
        if mine is not None and _shapes(mine) == _shapes(module):
            setattr(new, name, module)
    return new


def cp_resampler(old: Any, parts: int) -> CPDownsample2D | CPUpsample2D:
    """Return CP-Down for a Downsample2D, CP-Up for an Upsample2D, with ``parts`` splits or branches."""
    weight = (old.conv if hasattr(old, "conv") else old.Conv2d_0).weight
    down = type(old).__name__ == "Downsample2D"
    with torch.device(weight.device):
        new = CPDownsample2D(old.channels, parts, old.padding != 0) if down else CPUpsample2D(old.channels, parts)
    return new.to(dtype=weight.dtype).train(old.training)


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]
