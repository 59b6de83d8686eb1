"""Tiny networks of every family that `binarize.convert` serves, and what the tests need to know of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 16


@dataclass(frozen=True)
class ZooHost:
    """One family.

    Attributes:
        build: Returns the network.
        inputs: Returns positional and keyword arguments of its forward for a batch.
        timed: Whether its forward takes a timestep.
        kept: Convolutions that stay full precision by default, attention's aside.
        options: What `convert` is given beside the method.
        form: What the structure pass gives it: "published", "contract", or None where it has no such pass.
        library: What must be importable.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    timed: bool = True
    kept: tuple[str, ...] = ("conv_in", "conv_out")
    options: dict[str, Any] = field(default_factory=dict)
    form: str | None = None
    library: str = "torch"


def _timesteps(batch: int) -> Tensor:
    return torch.linspace(3, 990, batch).long()


def _picture(batch: int, channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(batch, channels, size, size)


def _timed(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_picture(batch), _timesteps(batch)), {}


def _labelled(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_picture(batch), _timesteps(batch)), {"y": torch.arange(batch) % 3}


def _conditioned(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_picture(batch, 4), _timesteps(batch)), {"encoder_hidden_states": torch.randn(batch, 5, 8)}


def _classified(size: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda batch: ((_picture(batch, size=size),), {})


def unet2d(widths: tuple[int, ...], attention: tuple[int, ...] = (), **options: Any) -> nn.Module:
    """Return a UNet2DModel; ``attention`` lists the levels that have it."""
    from diffusers import UNet2DModel

    down = tuple("AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(len(widths)))
    up = tuple("AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(range(len(widths))))
    settings: dict[str, Any] = {
        "sample_size": SIZE,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**settings, **options})


def unet2d_condition(widths: tuple[int, ...] = (8, 16), **options: Any) -> nn.Module:
    """Return a UNet2DConditionModel with Stable Diffusion's blocks: cross-attention everywhere but in the coarsest."""
    from diffusers import UNet2DConditionModel

    plain = len(widths) - 1
    settings: dict[str, Any] = {
        "sample_size": SIZE,
        "block_out_channels": widths,
        "down_block_types": ("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    }
    return UNet2DConditionModel(**{**settings, **options})


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Return ``(B, width)`` sines and cosines of the timesteps ``(B,)``."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps.float().reshape(-1, 1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, as guided-diffusion does with the last layer of a branch."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimestepEmbedSequential(nn.Sequential):
    """Passes the time embedding to the children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ADMResBlock) else layer(x)
        return x


class ADMResBlock(nn.Module):
    """guided-diffusion's residual block: scale-shift norm, zero-initialised last convolution, resampling inside."""

    def __init__(self, channels: int, out: int, emb: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(4, out), nn.SiLU(), nn.Dropout(0.0), zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.resample: nn.Module = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        out: Tensor = self.skip_connection(self.resample(x)) + h
        return out


class AttentionBlock(nn.Module):
    """guided-diffusion's self-attention: 1-D convolutions of kernel size 1 over the flattened picture."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        flat = x.reshape(batch, channels, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(batch * self.heads, -1, flat.shape[2]).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
        h = (v @ weight.transpose(1, 2)).reshape(batch, channels, -1)
        out: Tensor = (flat + self.proj_out(h)).reshape(batch, channels, *spatial)
        return out


class ADMUNet(nn.Module):
    """A U-Net in guided-diffusion's style: its module names, argument names and conventions."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        emb, wide = 4 * width, 2 * width
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(3, width, 3, padding=1)),
                TimestepEmbedSequential(ADMResBlock(width, width, emb)),
                TimestepEmbedSequential(ADMResBlock(width, width, emb, down=True)),
                TimestepEmbedSequential(ADMResBlock(width, wide, emb), AttentionBlock(wide)),
            ]
        )
        self.middle_block = TimestepEmbedSequential(
            ADMResBlock(wide, wide, emb), AttentionBlock(wide), ADMResBlock(wide, wide, emb)
        )
        self.output_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(ADMResBlock(2 * wide, wide, emb), AttentionBlock(wide)),
                TimestepEmbedSequential(ADMResBlock(wide + width, wide, emb), ADMResBlock(wide, wide, emb, up=True)),
                TimestepEmbedSequential(ADMResBlock(wide + width, width, emb)),
                TimestepEmbedSequential(ADMResBlock(width + width, width, emb)),
            ]
        )
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), zeroed(nn.Conv2d(width, 3, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoid(timesteps, self.width).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        out: Tensor = self.out(x)
        return out


class Block(nn.Module):
    """SR3's block: GroupNorm, Swish, dropout, convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Identity(), nn.Conv2d(channels, out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class ResnetBlocWithAttn(nn.Module):
    """SR3's residual block with a linear layer for the noise level, and maybe self-attention."""

    def __init__(self, channels: int, out: int, level: int, attention: bool = False) -> None:
        super().__init__()
        self.noise_func = nn.Linear(level, out)
        self.block1, self.block2 = Block(channels, out), Block(out, out)
        self.res_conv = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.attn = SelfAttention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.block1(x) + self.noise_func(level)[:, :, None, None]
        out: Tensor = self.attn(self.block2(h) + self.res_conv(x))
        return out


class SelfAttention(nn.Module):
    """SR3's self-attention: 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        out: Tensor = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return out


class Upsample(nn.Module):
    """SR3's upsampling: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Downsample(nn.Module):
    """SR3's downsampling: a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class SR3UNet(nn.Module):
    """A U-Net in SR3's style: its module names and conventions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        wide = 2 * width
        self.width = width
        self.noise_level_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.downs = nn.ModuleList(
            [
                nn.Conv2d(3, width, 3, padding=1),
                ResnetBlocWithAttn(width, width, width),
                Downsample(width),
                ResnetBlocWithAttn(width, wide, width, attention=True),
            ]
        )
        self.mid = nn.ModuleList([ResnetBlocWithAttn(wide, wide, width, attention=True)])
        self.ups = nn.ModuleList(
            [
                ResnetBlocWithAttn(2 * wide, wide, width, attention=True),
                ResnetBlocWithAttn(wide + width, wide, width),
                Upsample(wide),
                ResnetBlocWithAttn(wide + width, width, width),
                ResnetBlocWithAttn(2 * width, width, width),
            ]
        )
        self.final_conv = Block(width, 3)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = self.noise_level_mlp(sinusoid(time, self.width).to(x.dtype))
        skips = []
        for layer in self.downs:
            x = layer(x, level) if isinstance(layer, ResnetBlocWithAttn) else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, level)
        for layer in self.ups:
            x = layer(torch.cat([x, skips.pop()], 1), level) if isinstance(layer, ResnetBlocWithAttn) else layer(x)
        out: Tensor = self.final_conv(x)
        return out


def srunet() -> nn.Module:
    """Return our own U-Net in SR3's structure."""
    from binarize.models import SRUNet

    options: dict[str, Any] = {"base_channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "norm_groups": 4}
    return SRUNet(resampling="conv", fusion="wide", dropout=0.0, num_train_timesteps=1000, **options)


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 for five classes without its last stage, which holds three quarters of it."""
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    model.layer4, model.fc = nn.Identity(), nn.Linear(256, 5)
    return model


def convnext() -> nn.Module:
    """Return timm's ConvNeXt-Atto, made narrower and shallower."""
    import timm

    options: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model: nn.Module = timm.create_model("convnext_atto", pretrained=False, num_classes=5, **options)
    return model


def vit() -> nn.Module:
    """Return timm's ViT-Tiny, made narrower and shallower."""
    import timm

    options: dict[str, Any] = {"img_size": SIZE, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **options)
    return model


HOSTS: dict[str, ZooHost] = {
    "srunet": ZooHost(
        srunet, lambda batch: ((_picture(batch), _timesteps(batch), _picture(batch)), {}), form="published"
    ),
    "ddpm_cifar": ZooHost(lambda: unet2d((8, 16, 16), (1,)), _timed, form="contract"),
    "unet2d_attention": ZooHost(lambda: unet2d((8, 16), (0, 1)), _timed, form="published"),
    "unet2d_odd_widths": ZooHost(lambda: unet2d((8, 20)), _timed, form="contract"),
    "unet2d_resnet_sampling": ZooHost(
        lambda: unet2d((8, 16), (0, 1), downsample_type="resnet", upsample_type="resnet"), _timed, form="contract"
    ),
    "stable_diffusion": ZooHost(unet2d_condition, _conditioned, form="published", options={"linear": True}),
    "adm": ZooHost(ADMUNet, _labelled, kept=("input_blocks.0.0", "out.2")),
    "sr3": ZooHost(SR3UNet, _timed, kept=("downs.0", "final_conv.block.3")),
    "resnet18": ZooHost(resnet18, _classified(32), timed=False, kept=("conv1",), library="torchvision"),
    "convnext": ZooHost(convnext, _classified(32), timed=False, kept=("stem.0",), library="timm"),
    "vit": ZooHost(
        vit, _classified(SIZE), timed=False, kept=("patch_embed.proj",), options={"linear": True}, library="timm"
    ),
}


def output_of(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Run a host and return its prediction."""
    out = model(*inputs[0], **inputs[1])
    result: Tensor = out if isinstance(out, Tensor) else out.sample
    return result
