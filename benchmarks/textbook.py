"""The released BI-DiffSR network in its textbook form, as a reference for benchmarks and tests.

It computes the same function as ``convert(SRUNet(), "bidiffsr")``, with the techniques of the released code that cost
memory and time:

- signs are polynomial branches, combined with detach;
- weights are binarized in the same way, with the scale inside the weights;
- each timestep group is a module, selected for the whole batch by the timestep of the first sample;
- Swish is x * sigmoid(x), attention materializes its scores, and activations are NCHW.

    from textbook import textbook_twin
    reference = textbook_twin(unet)  # same weights, same outputs, same gradients
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SignZero = Literal["plus", "zero"]


def sign(x: Tensor, zero: SignZero) -> Tensor:
    return torch.sign(x) if zero == "zero" else torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class PolynomialSign(nn.Module):
    """sign(x) with the gradient of a piecewise polynomial: -1, x^2 + 2x, -x^2 + 2x, 1."""

    def __init__(self, zero: SignZero) -> None:
        super().__init__()
        self.zero: SignZero = zero

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to {-1, +1}; with ``zero="zero"``, map 0 to 0."""
        below, negative, inside = ((x < edge).to(x.dtype) for edge in (-1, 0, 1))
        left = (-1) * below + (x * x + 2 * x) * (1 - below)
        middle = left * negative + (-x * x + 2 * x) * (1 - negative)
        smooth = middle * inside + 1 * (1 - inside)
        return sign(x, self.zero).detach() - smooth.detach() + smooth


class Bias(nn.Module):
    """x + b, with one b per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``(B, C, H, W)``."""
        return x + self.bias.expand_as(x)


class Activation(nn.Module):
    """Shift, PReLU, shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_in, self.prelu, self.shift_out = Bias(channels), nn.PReLU(channels), Bias(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Activate ``(B, C, H, W)``."""
        return self.shift_out(self.prelu(self.shift_in(x)))


class ScaledSignConv(nn.Module):
    """A convolution with mean |w| sign(w) and the gradient of clamp(w, -1, 1)."""

    def __init__(self, channels: int, kernel_size: int, zero: SignZero) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.zero: SignZero = zero

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)`` to the same shape."""
        scale = self.weight.abs().mean(dim=3, keepdim=True).mean(dim=2, keepdim=True).mean(dim=1, keepdim=True).detach()
        hard = (scale * sign(self.weight, self.zero)).detach()
        clipped = torch.clamp(self.weight, -1.0, 1.0)
        return F.conv2d(x, hard - clipped.detach() + clipped, padding=self.weight.shape[-1] // 2)


class BinaryBlock(nn.Module):
    """x + activation_g(conv(sign(x + b_g))), with one module per timestep group g."""

    def __init__(self, channels: int, kernel_size: int, groups: int, zero: SignZero) -> None:
        super().__init__()
        self.shifts = nn.ModuleList(Bias(channels) for _ in range(groups))
        self.sign = PolynomialSign(zero)
        self.conv = ScaledSignConv(channels, kernel_size, zero)
        self.activations = nn.ModuleList(Activation(channels) for _ in range(groups))

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        y = self.shifts[group](x)
        y = self.sign(y)
        y = self.conv(y)
        y = self.activations[group](y)
        return y + x


class FloatBlock(nn.Conv2d):
    """A full-precision convolution that ignores the timestep group."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, group: int) -> Tensor:  # type: ignore[override]
        """Map ``(B, C, H, W)`` to the same shape."""
        return super().forward(x)


class Make:
    """Builds binary or float convolutions."""

    def __init__(self, groups: int, zero: SignZero) -> None:
        self.groups, self.zero = groups, zero

    def __call__(self, channels: int, kernel_size: int, binary: bool) -> nn.Module:
        """Return a block that keeps the number of channels."""
        return (
            BinaryBlock(channels, kernel_size, self.groups, self.zero) if binary else FloatBlock(channels, kernel_size)
        )


class Swish(nn.Module):
    """X * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate any shape."""
        return x * torch.sigmoid(x)


class Attention(nn.Module):
    """Self-attention over all pixels, with materialized scores."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``(B, C, H, W)``."""
        b, c, h, w = x.shape
        query, key, value = self.qkv(self.norm(x)).reshape(b, 3 * c, h * w).chunk(3, dim=1)
        scores = torch.softmax(torch.einsum("bcn, bcm -> bnm", query, key) / math.sqrt(c), dim=-1)
        return x + self.out(torch.einsum("bnm, bcm -> bcn", scores, value).reshape(b, c, h, w))


class Fusion(nn.Module):
    """CS-Fusion."""

    def __init__(self, channels: int, binary: bool, make: Make) -> None:
        super().__init__()
        self.convs = nn.ModuleList(make(channels, 1, binary) for _ in range(2))

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Map ``(B, 2 C, H, W)`` to ``(B, C, H, W)``."""
        hidden, skip = x.chunk(2, dim=1)
        first = torch.cat((hidden[:, 1::2], skip[:, 0::2]), dim=1)
        second = torch.cat((hidden[:, 0::2], skip[:, 1::2]), dim=1)
        return self.convs[0](first, group) + self.convs[1](second, group)


class Down(nn.Module):
    """CP-Down."""

    def __init__(self, channels: int, make: Make) -> None:
        super().__init__()
        self.convs = nn.ModuleList(make(channels // 2, 3, True) for _ in range(2))
        self.unshuffle = nn.PixelUnshuffle(2)

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, 2 C, H / 2, W / 2)``."""
        first, second = x.chunk(2, dim=1)
        return self.unshuffle(self.convs[0](first, group) + self.convs[1](second, group))


class Up(nn.Module):
    """CP-Up."""

    def __init__(self, channels: int, make: Make) -> None:
        super().__init__()
        self.convs = nn.ModuleList(make(channels, 3, True) for _ in range(2))
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C / 2, 2 H, 2 W)``."""
        return self.shuffle(torch.cat([conv(x, group) for conv in self.convs], dim=1))


class Block(nn.Module):
    """Norm, Swish, convolution, + time, norm, Swish, dropout, convolution, + input."""

    def __init__(
        self,
        channels: int,
        time_channels: int,
        norm_groups: int,
        dropout: float,
        make: Make,
        *,
        binary: bool = True,
        fuse: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.fusion = Fusion(channels, binary, make) if fuse else None
        self.norm1, self.swish1 = nn.GroupNorm(norm_groups, channels), Swish()
        self.conv1 = make(channels, 3, binary)
        self.time_swish, self.time = Swish(), nn.Linear(time_channels, channels)
        self.norm2, self.swish2 = nn.GroupNorm(norm_groups, channels), Swish()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = make(channels, 3, binary)
        self.attention = Attention(channels, norm_groups) if attention else None

    def forward(self, x: Tensor, time: Tensor, group: int, skip: Tensor | None = None) -> Tensor:
        """Map ``(B, C, H, W)``, and optionally a skip of the same shape, to ``(B, C, H, W)``."""
        if self.fusion is not None and skip is not None:
            x = self.fusion(torch.cat((x, skip), dim=1), group)
        h = self.conv1(self.swish1(self.norm1(x)), group)
        h = h + self.time(self.time_swish(time))[:, :, None, None]
        h = self.conv2(self.dropout(self.swish2(self.norm2(h))), group)
        h = h + x
        return h if self.attention is None else self.attention(h)


class Level(nn.Module):
    """The blocks of one resolution and the resampler after them."""

    def __init__(self, blocks: Iterable[nn.Module], **resampler: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in resampler.items():
            self.add_module(name, module)


class TextbookSRUNet(nn.Module):
    """BI-DiffSR's U-Net. The defaults are the released configuration.

    Args:
        in_channels: Channels of condition and sample together.
        out_channels: Channels of the prediction.
        base_channels: Width of the finest level; each level doubles it.
        levels: Number of levels.
        res_blocks: Blocks per encoder level; a decoder level has one more.
        norm_groups: Groups of every GroupNorm.
        dropout: Dropout probability inside blocks.
        groups: K, the number of timestep groups.
        num_train_timesteps: T, the number of training timesteps.
        fp_decoder_levels: Decoder levels (0 is the finest) in full precision.
        sign_zero: The value of sign(0): "plus" for +1, "zero" for 0 as released.
    """

    def __init__(
        self,
        in_channels: int = 6,
        out_channels: int = 3,
        base_channels: int = 64,
        levels: int = 4,
        res_blocks: int = 2,
        norm_groups: int = 16,
        dropout: float = 0.2,
        groups: int = 5,
        num_train_timesteps: int = 2000,
        fp_decoder_levels: Sequence[int] = (0, 1),
        sign_zero: SignZero = "zero",
    ) -> None:
        super().__init__()
        self.groups, self.num_train_timesteps, self.base_channels = groups, num_train_timesteps, base_channels
        base, common, make = base_channels, (base_channels, norm_groups, dropout), Make(groups, sign_zero)
        self.time_mlp = nn.Sequential(nn.Linear(base, 4 * base), Swish(), nn.Linear(4 * base, base))
        self.conv_in = nn.Conv2d(in_channels, base, 3, padding=1)
        widths = [base * 2**level for level in range(levels)]
        self.encoder = nn.ModuleList(
            Level(
                [Block(width, *common, make) for _ in range(res_blocks)],
                down=Down(width, make) if width != widths[-1] else None,
            )
            for width in widths
        )
        self.middle = nn.ModuleList(Block(widths[-1], *common, make, attention=flag) for flag in (True, False))
        self.decoder = nn.ModuleList(
            Level(
                [
                    Block(width, *common, make, binary=level not in fp_decoder_levels, fuse=True)
                    for _ in range(res_blocks + 1)
                ],
                up=Up(width, make) if level > 0 else None,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out, self.swish_out = nn.GroupNorm(norm_groups, base), Swish()
        self.conv_out = nn.Conv2d(base, out_channels, 3, padding=1)

    def embed(self, timesteps: Tensor) -> Tensor:
        """Encode ``(B,)`` timesteps as ``(B, C)``."""
        half = self.base_channels // 2
        k = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device) / half
        angles = timesteps.unsqueeze(1) * torch.exp(-math.log(1e4) * k)
        return self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=1))

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Predict the noise of ``(B, 3, H, W)``; the first of ``(B,)`` timesteps selects the group of all samples."""
        group = min(max(int(timestep[0].item() * self.groups / self.num_train_timesteps), 0), self.groups - 1)
        time = self.embed(timestep.to(sample.dtype))
        x = self.conv_in(torch.cat((condition, sample), dim=1))
        skips = [x]
        for level in self.encoder:
            for block in level.blocks:
                x = block(x, time, group)
                skips.append(x)
            if level.down is not None:
                x = level.down(x, group)
                skips.append(x)
        for block in self.middle:
            x = block(x, time, group)
        for level in reversed(self.decoder):
            for block in level.blocks:
                x = block(x, time, group, skips.pop())
            if level.up is not None:
                x = level.up(x, group)
        return self.conv_out(self.swish_out(self.norm_out(x)))


_STACKED = (
    (r"\.pre\.bias$", "shifts", "bias"),
    (r"\.post\.shift_in$", "activations", "shift_in.bias"),
    (r"\.post\.slope$", "activations", "prelu.weight"),
    (r"\.post\.shift_out$", "activations", "shift_out.bias"),
)


def textbook_names(state: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """Return the textbook network's tensors for each tensor of a converted SRUNet.

    Args:
        state: Parameters, gradients or the state dict of an SRUNet converted with "bidiffsr", by name.

    Returns:
        SRUNet name -> [(textbook name, value)]: one pair, or one per timestep group of a stacked parameter.
    """
    binary = {name[: -len(".pre.bias")] for name in state if name.endswith(".pre.bias")}
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        if prefix in binary and last == "weight":
            found[name] = [(f"{prefix}.conv.weight", value)]
            continue
        found[name] = [(name, value)]
        for pattern, modules, inside in _STACKED:
            stem, hits = re.subn(pattern, "", name)
            if hits:
                shape = (-1,) if inside == "prelu.weight" else (1, -1, 1, 1)
                found[name] = [(f"{stem}.{modules}.{k}.{inside}", row.reshape(shape)) for k, row in enumerate(value)]
    return found


def textbook_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a converted SRUNet to that of the textbook network."""
    return {name: value for pairs in textbook_names(state).values() for name, value in pairs}


def textbook_twin(unet: Any) -> TextbookSRUNet:
    """Return the textbook network with the configuration, weights, dtype and mode of a converted SRUNet.

    Args:
        unet: `binarize.models.SRUNet` with resampling "cp" and fusion "cs", converted with "bidiffsr".
    """
    config, layer = unet.config, unet.encoder[0].blocks[0].conv1
    full_precision = [level for level, stage in enumerate(unet.decoder) if isinstance(stage.blocks[0].conv1, nn.Conv2d)]
    twin = TextbookSRUNet(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        base_channels=config.base_channels,
        levels=len(config.channel_mults),
        res_blocks=config.res_blocks,
        norm_groups=config.norm_groups,
        dropout=config.dropout,
        groups=layer.method.groups,
        num_train_timesteps=config.num_train_timesteps,
        fp_decoder_levels=full_precision,
        sign_zero=layer.method.sign_zero,
    )
    twin.to(unet.dtype)
    twin.load_state_dict(textbook_state(unet.state_dict()))
    return twin.train(unet.training)
